"""Metrics: the text is what the format says, and docs/metrics.md says what is in it."""

import os

import pytest

from imgsnap.blockstore.cache_quota import UNLIMITED
from imgsnap.blockstore.stalls import StallLog
from imgsnap.blockstore.statistics import CacheCounts, Statistics
from imgsnap.errors import InvalidArgument
from imgsnap.node.metrics import FAMILIES, HOSTS_MAX, SNAPSHOTS_MAX, NodeState, render
from imgsnap.node.metrics_http import parse_address
from imgsnap.node.process_usage import process_usage
from tests.support import metrics_docs
from tests.support.metrics_text import parse_metrics


def statistics(**changes) -> dict:
    counts = Statistics(hits=5, misses=2, **changes)
    counts.host("mirror:5000").bytes = 10
    return counts.as_dict()


def stalls(repository: str = "registry/app") -> dict:
    log = StallLog()
    for _ in range(3):
        log.begin(0, 1, lambda data, error: None)(None, None)
    return log.totals() | {"repository": repository}


def state(devices: dict, stalled: dict, **changes) -> NodeState:
    server = {
        "pid": 1,
        "cache": CacheCounts(damage=4).as_dict(),
        "devices": devices,
        "stalls": stalled,
    }
    values = {
        "version": "1.2",
        "server": server,
        "supervisor": {"pid": 2, "starts": 3},
        "attachments": 1,
        "mounts": {"daemon": 1},
        "cache": {"extents": 4096},
        "quota": 1 << 30,
        "processes": {"control": process_usage(os.getpid())},
    }
    return NodeState(**(values | changes))


def full() -> NodeState:
    return state({"aa": statistics()}, {"aa": stalls()})


def test_the_page_and_what_is_rendered_are_the_same():
    metrics_docs.check(metrics_docs.section(), render(full()), FAMILIES)


def test_values():
    metrics = parse_metrics(render(full()))
    own = {"snapshot": "sha256:aa", "repository": "registry/app"}
    assert metrics.value("imgsnap_reads_total", result="hit", **own) == 5
    assert metrics.value("imgsnap_reads_total", result="miss", **own) == 2
    assert metrics.value("imgsnap_host_bytes_total", host="mirror:5000", **own) == 10
    assert metrics.value("imgsnap_stall_seconds_count", **own) == 3
    assert metrics.value("imgsnap_stall_seconds_bucket", le="+Inf", **own) == 3
    cache = {"place": "cache", "snapshot": "", "repository": ""}
    assert metrics.value("imgsnap_damaged_chunks_total", **cache) == 4
    assert metrics.value("imgsnap_cache_quota_bytes") == 1 << 30
    endless = parse_metrics(render(state({}, {}, quota=UNLIMITED)))
    assert endless.value("imgsnap_cache_quota_bytes") == float("inf")


def test_a_boot_packs_counters_when_there_are_some():
    devices = {"aa": statistics() | {"pack": {"requests": 1, "bytes": 99, "blocks": 7, "used": 6}}}
    metrics = parse_metrics(render(state(devices, {"aa": stalls()})))
    own = {"snapshot": "sha256:aa", "repository": "registry/app"}
    assert metrics.value("imgsnap_pack_bytes_total", **own) == 99
    assert metrics.value("imgsnap_pack_used_blocks_total", **own) == 6


def test_what_is_down_is_a_value_and_the_rest_is_told():
    down = parse_metrics(render(state({}, {}, server=None, supervisor=None, cache=None)))
    assert down.value("imgsnap_up") == 0
    assert down.value("imgsnap_attachments") == 1
    assert "imgsnap_reads_total" not in down.types
    nothing = parse_metrics(render(NodeState("1", None, None)))
    assert set(nothing.types) == {"imgsnap_up", "imgsnap_build_info"}


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", 'x"} 1\nimgsnap_up 1', "\udcff", "é"])
def test_names_cannot_leave_their_label(name: str):
    metrics = parse_metrics(render(state({"aa": statistics()}, {"aa": stalls(name)})))
    shown = name.encode("utf-8", "backslashreplace").decode()
    own = {"snapshot": "sha256:aa", "repository": shown}
    assert metrics.value("imgsnap_reads_total", result="hit", **own) == 5


def test_the_page_is_bounded():
    devices = {f"{number:04x}": statistics() for number in range(SNAPSHOTS_MAX + 3)}
    hosts = {f"h{number}": {"requests": 1, "bytes": 1} for number in range(HOSTS_MAX + 9)}
    devices["0000"]["hosts"] = hosts
    metrics = parse_metrics(render(state(devices, {})))
    shown = {dict(labels)["snapshot"] for name, labels in metrics.samples if "reads" in name}
    assert len(shown) == SNAPSHOTS_MAX
    assert metrics.value("imgsnap_snapshots_left_out") == 3
    named = [labels for name, labels in metrics.samples if name == "imgsnap_host_bytes_total"]
    assert sum(dict(labels)["snapshot"] == "sha256:0000" for labels in named) == HOSTS_MAX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9477", ("127.0.0.1", 9477)),
        (":9477", ("127.0.0.1", 9477)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]):
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "x", "::1:80", "[]:80", "1.2.3.4:", "1.2.3.4:0", "a:65536"])
def test_no_addresses(text: str):
    with pytest.raises(InvalidArgument):
        parse_address(text)


def test_a_process_that_is_gone_has_no_usage():
    own = process_usage(os.getpid())
    assert own["rss_bytes"] > 1 << 20 and own["cpu_seconds"] > 0 and own["open_fds"] >= 3
    assert process_usage(2**22 + 1) == {}
