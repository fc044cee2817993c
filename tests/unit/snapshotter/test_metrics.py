"""The snapshotter's metrics: what is counted when, and docs/metrics.md says what is in them."""

import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from imgsnap.errors import Unavailable
from imgsnap.node.metrics_http import MetricsServer
from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.labels import TARGET
from imgsnap.snapshotter.metrics import FAMILIES, SnapshotterObserver
from imgsnap.snapshotter.rows import STATES
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support import metrics_docs
from tests.support.docker_registry import free_port
from tests.support.metrics_text import parse_metrics
from tests.support.remote_parts import labels_of
from tests.unit.snapshotter.conftest import APP, Core
from tests.unit.snapshotter.test_claims import OTHER, pull


@pytest.fixture
def counted(core: Core) -> tuple[Core, Counters, SnapshotterObserver]:
    counters = Counters()
    claims = Claims(core.ledger, core.directories, core.images, core.devices, core.layers, counters)
    core = replace(core, snapshots=Snapshots(core.ledger, core.directories, claims))
    observer = SnapshotterObserver(core.snapshots, counters, core.devices, lambda: 7)
    return core, counters, observer


def test_the_page_and_what_is_rendered_are_the_same(counted):
    core, counters, observer = counted
    counters.rpc("Prepare", "OK", 0.002)
    counters.add("conversions", result="failed")
    counters.add("materialised_layers", result="done")
    pull(core, APP)
    pull(core, OTHER, "n/2")
    text = metrics_docs.section("The snapshotter")
    metrics_docs.check(text, observer.page(), FAMILIES)
    assert all(f"`{state}`" in text for state in STATES)


def test_what_is_counted(counted):
    core, _, observer = counted
    rows = pull(core, APP)
    pull(core, OTHER, "n/2")  # nobody knows a snapshot of it; its base is there
    found = parse_metrics(observer.page())
    prefix = "imgsnap_snapshotter_"
    assert found.value(prefix + "up") == 1
    assert found.value(prefix + "claims_total", kind="placeholder") == 2
    assert found.value(prefix + "claims_total", kind="device") == 1
    assert found.value(prefix + "fallbacks_total", reason="no_snapshot") == 2
    assert found.value(prefix + "snapshots", state="device") == 1
    assert found.value(prefix + "snapshots", state="view") == 0
    assert found.value(prefix + "devices") == 1
    assert found.value(prefix + "conversions_waiting") == 7
    core.layers.fails = Unavailable("away")
    with pytest.raises(Unavailable):
        core.snapshots.prepare("c", rows[0].name, {})
    core.layers.fails = None
    core.snapshots.prepare("c", rows[0].name, {})
    found = parse_metrics(observer.page())
    for result in ("done", "failed"):
        assert found.value(prefix + "materialised_layers_total", result=result) == 1


@pytest.mark.parametrize("reason", ["labels", "place", "device"])
def test_why_a_layer_was_not_claimed(counted, reason: str):
    core, _, observer = counted
    labels = labels_of(APP, 0)
    if reason == "labels":
        labels[TARGET] = "sha256:../x"
    elif reason == "place":
        labels = labels_of(APP, 1)
    else:
        core.devices.missing.add(APP.digest)
    core.snapshots.prepare("k", "", labels)
    found = parse_metrics(observer.page())
    assert found.value("imgsnap_snapshotter_fallbacks_total", reason=reason) == 1


def test_times_are_in_buckets():
    counters = Counters()
    for seconds in (0.0005, 0.001, 0.3, 100.0):
        counters.rpc("Commit", "OK", seconds)
    samples = [sample for sample in counters.samples() if sample.suffix == "_bucket"]
    by_end = {sample.labels["le"]: sample.value for sample in samples}
    assert (by_end["0.001"], by_end["0.25"], by_end["0.5"], by_end["60.0"]) == (2, 2, 3, 3)
    assert by_end["+Inf"] == 4


def test_health_over_http(counted):
    core, _, observer = counted
    address = f"127.0.0.1:{free_port()}"
    server = MetricsServer(address, observer)
    server.start()
    try:
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as answer:
            assert answer.read() == b"ok\n"
        core.ledger.close()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"http://{address}/healthz", timeout=10)
        assert caught.value.code == 503 and b"ledger" in caught.value.read()
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            found = parse_metrics(answer.read().decode())
        assert found.value("imgsnap_snapshotter_up") == 0
        assert "imgsnap_snapshotter_snapshots" not in found.types
    finally:
        server.shutdown()
        server.server_close()
