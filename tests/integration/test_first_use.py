"""Conversion on first use: one node runs an ordinary image and converts it, the next claims it."""

import base64
import contextlib
import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.containerd import release, running_containerd
from tests.support.cri import cri
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, free_port
from tests.support.image_builder import collect, image, sha256
from tests.support.installed import Ours, ours, reached, run
from tests.support.metrics_text import parse_metrics
from tests.support.node import wait_for
from tests.support.samples import program_tar
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
APP = layer_tar([Item(b"app", content=b"the app\n")])
WAIT_S = 120.0


def wait_long(true: Callable[[], bool], what: str) -> None:
    """For a conversion, which gets no processor while others want it."""
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def metrics(address: str):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as answer:
        return parse_metrics(answer.read().decode())


def conversions(address: str, result: str) -> float:
    found = metrics(address)
    if "imgsnap_snapshotter_conversions_total" not in found.types:
        return 0
    return found.value("imgsnap_snapshotter_conversions_total", result=result)


def fetched(registry: DockerRegistry) -> set[str]:
    """The blobs that somebody got."""
    gets = [a.path for a in registry.accesses() if a.method == "GET" and "/blobs/" in a.path]
    return {path.rpartition("/")[2] for path in gets}


def test_the_next_node_finds_what_the_first_has_converted(
    cli: Cli, other_cli: Cli, own_registry: DockerRegistry, name: str
):
    tars = (program_tar(), APP)
    reference = own_registry.put(name, collect(image(*tars), "1.0"))
    layers = {sha256(layer.data) for layer in image(*tars).layers}
    everywhere = f"{own_registry.address}/*"
    address = f"127.0.0.1:{free_port()}"
    options = ("--trust", everywhere, "--convert", everywhere, "--metrics", address)
    with (
        ours(cli, *options) as first,
        running_containerd(release("1.6"), snapshotter=first.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        assert first.states() == ["layer", "layer"]
        assert metrics(address).value("imgsnap_snapshotter_conversions_waiting") == 0
        assert run(containerd, reference, "cat /app") == "the app\n"
        wait_long(lambda: conversions(address, "converted") == 1, "a conversion")
        assert run(containerd, reference, "cat /app") == "the app\n", "still an ordinary one"
        assert metrics(address).value("imgsnap_snapshotter_conversions_waiting") == 0, "once only"
        assert list((first.work / "state/converting").iterdir()) == []
        check_another_node(other_cli, own_registry, reference, layers)
        # this node has remembered it, too
        calls.remove_image(reference)
        wait_for(lambda: first.states() == [], "the image's end")
        calls.pull(reference)
        assert first.states() == ["placeholder", "device"]
        found = metrics(address)
        claims = "imgsnap_snapshotter_claims_total"
        assert [found.value(claims, kind=k) for k in ("placeholder", "device")] == [1, 1]
        assert found.value("imgsnap_snapshotter_fallbacks_total", reason="no_snapshot") == 2
        calls.remove_image(reference)
        wait_for(lambda: first.states() == [] and first.shown() == [], "nothing left")


def check_another_node(cli: Cli, registry: DockerRegistry, reference: str, layers: set[str]):
    with (
        ours(cli, "--trust", "*") as second,
        running_containerd(release("1.6"), snapshotter=second.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(registry.address)
        registry.accesses()
        calls.pull(reference)
        assert second.states() == ["placeholder", "device"]
        assert not layers & fetched(registry)
        assert run(containerd, reference, "cat /app") == "the app\n"
        calls.remove_image(reference)
        wait_for(lambda: second.states() == [] and second.shown() == [], "nothing left")


def test_what_may_not_be_pushed_runs_all_the_same(
    cli: Cli, own_registry: DockerRegistry, name: str
):
    """The registry refuses writes; that is logged once, and counted."""
    reference = own_registry.put(name, collect(image(program_tar(), APP), "1.0"))
    own_registry.stop()
    own_registry.read_only = True
    own_registry.start()
    address = f"127.0.0.1:{free_port()}"
    with (
        ours(cli, "--convert", "*", "--metrics", address) as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        assert run(containerd, reference, "cat /app") == "the app\n"
        wait_long(lambda: conversions(address, "failed") == 1, "a failed conversion")
        assert run(containerd, reference, "cat /app") == "the app\n"
        assert metrics(address).value("imgsnap_snapshotter_conversions_waiting") == 0
        assert (it.work / "log").read_text().count("is not converted") == 1


def test_it_is_published_with_the_snapshotters_credentials(
    cli: Cli, own_registry: DockerRegistry, name: str, tmp_path: Path
):
    reference = own_registry.put(name, collect(image(program_tar(), APP), "1.0"))
    own_registry.stop()
    own_registry.auth = True
    own_registry.start()
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {own_registry.address: {"auth": token}}}))
    address = f"127.0.0.1:{free_port()}"
    options = ("--convert", "*", "--metrics", address, "--registry-config", str(config))
    with (
        ours(cli, *options) as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference, USER, PASSWORD)
        assert run(containerd, reference, "cat /app") == "the app\n"
        wait_long(lambda: conversions(address, "converted") == 1, "a conversion")


def converters(it: Ours) -> list[int]:
    """The processes that convert for a snapshotter."""
    assert it.process is not None
    children = Path(f"/proc/{it.process.pid}/task")
    found = []
    for task in children.iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # either may end meanwhile
            for pid in (task / "children").read_text().split():
                if b"convert_image" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
    return found


def modest(pid: int) -> bool:
    """Whether a process gives way to all others, and dies before them."""
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    return nice == 19 and Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"


def test_a_conversion_ends_with_its_snapshotter_and_is_begun_anew(
    cli: Cli, own_registry: DockerRegistry, name: str
):
    reference = own_registry.put(name, collect(image(program_tar(), APP), "1.0"))
    with (
        ours(cli, "--convert", "*") as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        run(containerd, reference, "cat /app")
        (pid,) = wait_for(lambda: converters(it), "a conversion")
        wait_for(lambda: modest(pid), "the lowest priority")
        it.process.terminate()
        assert it.process.wait(30) == 0
        assert not Path(f"/proc/{pid}").exists()
        assert not list((it.work / "state/converting").iterdir())
        (it.work / "state/converting/left").mkdir()  # by one that was killed
        it.start()
        wait_for(lambda: reached(containerd), "containerd's next attempt to connect")
        run(containerd, reference, "cat /app")
        wait_long(lambda: has_snapshot(own_registry, name), "a snapshot in the registry")
        place = it.work / "state/converting"
        wait_for(lambda: not converters(it) and not list(place.iterdir()), "the conversion's end")


def has_snapshot(registry: DockerRegistry, name: str) -> bool:
    with urllib.request.urlopen(registry.url(f"{name}/tags/list")) as answer:
        return any(tag.endswith(".imgsnap") for tag in json.load(answer)["tags"])
