"""What a node shows of itself: `imgsnap explain` and metrics, against real mounts."""

import html.parser
import os
import re
import shutil
import signal
import socket
import urllib.error
import urllib.request
from contextlib import ExitStack

import pytest

from imgsnap.mount import linux
from imgsnap_cli.explain_html import page as html_page
from tests.support.browser import dom
from tests.support.cli import Cli
from tests.support.explanations import HOSTILE, KNOWN, explanation, stall
from tests.support.image_builder import collect, image
from tests.support.metrics_text import parse_metrics
from tests.support.node import Node, node_daemon, wait_for
from tests.support.samples import many_files

pytestmark = pytest.mark.root

FILES, SIZE = 12, 300_000


@pytest.fixture
def address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def node(cli: Cli, address: str):
    with node_daemon(cli, {"IMGSNAP_METRICS": address}) as running:
        yield running


@pytest.fixture
def snapshot(cli: Cli, registry, name: str) -> str:
    """A snapshot in a registry, nothing of it cached."""
    remote = registry.put(name, collect(image(many_files(size=SIZE, count=FILES))))
    target = f"{registry.address}/{name}:snap"
    cli.convert(remote, target, "--plain-http")
    return target


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def check_explanation(found: dict, path: str, host: str) -> None:
    """A stall names the file, who served it, its layer and chunk."""
    stalls = [stall for stall in found["stalls"] if path in stall["paths"]]
    assert stalls
    for wait in stalls:
        assert wait["wait"] > 0 and wait["at"] >= 0 and not wait["error"]
        assert wait["length"] > 0 and wait["chunk_count"] >= len(wait["chunks"])
    fetched = [stall for stall in stalls if stall["sources"] == [host]]
    assert fetched, [stall["sources"] for stall in stalls]
    assert all(stall["layers"] and stall["chunks"] and stall["bytes"] for stall in fetched)
    totals = found["totals"]
    assert totals["stalls"] == len(found["stalls"]) == found["misses"] == sum(totals["buckets"])
    assert totals["wait"] == pytest.approx(sum(stall["wait"] for stall in found["stalls"]))
    assert 0 < totals["held_up"] <= totals["wait"] + 1e-9
    assert found["reads"] == found["hits"] + found["misses"]
    assert [stall["at"] for stall in found["stalls"]] == sorted(
        stall["at"] for stall in found["stalls"]
    )


def test_explain_names_the_file_and_who_served_it(
    node: Node, cli: Cli, snapshot, registry, tmp_path, address
):
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", snapshot, tree)
    (tree / "f07").read_bytes()
    found = cli("explain", tree, "--format", "json").json
    assert found["target"] == str(tree) and not found["direct"] and found["notes"] == []
    check_explanation(found, "/f07", registry.address)
    assert not any("/f02" in stall["paths"] for stall in found["stalls"])
    # By digest, whole or its beginning, without the directory.
    for name in (found["snapshot"], found["snapshot"][7:19]):
        again = cli("explain", name, "--format", "json").json
        assert again["snapshot"] == found["snapshot"] and again["target"] is None
        check_explanation(again, "/f07", registry.address)

    text = cli("explain", tree, "--top", 1).out
    assert text.splitlines()[0].split() == [
        *("AT", "ms", "WAIT", "ms", "BYTES", "SOURCE", "LAYER", "CHUNK", "FILE")
    ]
    assert f"reads      {found['reads']}: " in text and registry.address in text
    page = tmp_path / "start.html"
    assert cli("explain", tree, "--format", "html", "-o", page).out == ""
    parser = html.parser.HTMLParser()
    parser.feed(page.read_text())
    parser.close()
    assert "/f07" in page.read_text()

    code, body = get(address, "/metrics")
    assert code == 200
    metrics = parse_metrics(body)
    own = {"snapshot": found["snapshot"], "repository": registry_name(snapshot)}
    assert metrics.value("imgsnap_up") == 1
    assert metrics.value("imgsnap_attachments") == 1
    assert metrics.value("imgsnap_mounts", server="daemon") == 1
    assert metrics.value("imgsnap_reads_total", result="miss", **own) >= found["misses"] > 0
    fetched = [
        metrics.value("imgsnap_fetch_bytes_total", priority=priority, **own)
        for priority in ("demand", "readahead", "prefetch")
    ]
    assert sum(fetched) > 0  # a read may join the readahead that it has caused
    assert metrics.value("imgsnap_host_requests_total", host=registry.address, **own) > 0
    assert metrics.value("imgsnap_stall_seconds_count", **own) >= found["totals"]["stalls"]
    assert metrics.value("imgsnap_stall_seconds_sum", **own) > 0
    assert metrics.value("imgsnap_cache_bytes", kind="extents") >= 0
    assert metrics.value("imgsnap_cache_quota_bytes") == float("inf")
    assert metrics.value("imgsnap_block_server_starts_total") == 1
    for process in ("control", "supervisor", "block"):
        assert metrics.value("imgsnap_process_resident_memory_bytes", process=process) > 1 << 20
        assert metrics.value("imgsnap_process_open_fds", process=process) > 0
    assert get(address, "/healthz") == (200, "ok\n")
    assert get(address, "/")[0] == 404
    request = urllib.request.Request(f"http://{address}/metrics", data=b"x", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 501
    refused.value.close()
    cli("umount", tree)
    cli.fails(4, "explain", tree)
    cli.fails(4, "explain", found["snapshot"])


def registry_name(reference: str) -> str:
    """What the block server calls the repository of a reference."""
    return reference.rpartition(":")[0]


def test_metrics_say_that_the_block_server_is_down(
    node: Node, cli: Cli, snapshot, tmp_path, address
):
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", snapshot, tree)
    server = node.server()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        metrics = parse_metrics(get(address, "/metrics")[1])
        assert metrics.value("imgsnap_up") == 0
        assert metrics.value("imgsnap_attachments") == 1
        assert metrics.value("imgsnap_mounts", server="daemon") == 1
        assert "imgsnap_reads_total" not in metrics.types
        assert get(address, "/healthz")[0] == 503
    finally:
        os.kill(server.pid, signal.SIGCONT)
    node.kill(server)
    wait_for(node.server, "the next server")
    metrics = parse_metrics(get(address, "/metrics")[1])
    assert metrics.value("imgsnap_up") == 1
    assert metrics.value("imgsnap_block_server_starts_total") == 2
    # The next server has opened nothing yet: said, not an error.
    assert "note" in cli("explain", tree).out
    node.kill_control()
    node.start({"IMGSNAP_METRICS": address})
    wait_for(node.status, "the control process")
    assert get(address, "/healthz") == (200, "ok\n")
    cli("umount", tree)


def test_explain_of_a_mount_with_a_server_of_its_own(cli: Cli, snapshot, registry, tmp_path):
    tree = tmp_path / "tree"
    cli("mount", "--rw", "--plain-http", snapshot, tree)
    (tree / "f03").read_bytes()
    found = cli("explain", tree, "--format", "json").json
    check_explanation(found, "/f03", registry.address)
    cli.fails(4, "explain", found["snapshot"])  # no daemon, so no names
    cli("umount", tree)


def test_explain_of_a_container_is_of_the_snapshot_beneath_it(
    cli: Cli, snapshot, registry, tmp_path
):
    """As containerd's shims mount it: an overlay on <namespace>/<id>/rootfs."""
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", snapshot, tree)
    roots = [tmp_path / "default" / name / "rootfs" for name in ("c0ffee123456", "c0ffee654321")]
    with ExitStack() as mounted:
        for root in roots:
            for name in ("rootfs", "upper", "work"):
                (root.parent / name).mkdir(parents=True)
            options = f"lowerdir={tree},upperdir={root.parent}/upper,workdir={root.parent}/work"
            linux.mount("overlay", root, "overlay", linux.MountFlag(0), options)
            mounted.callback(linux.umount, root, linux.UmountFlag(0))
        (roots[0] / "f04").read_bytes()
        for name in ("c0ffee123456", "c0ffee1", str(roots[1])):
            found = cli("explain", name, "--format", "json").json
            check_explanation(found, "/f04", registry.address)
            assert found["target"] == str(tree)
        assert "2 containers" in cli.fails(2, "explain", "c0ffee")
        cli.fails(4, "explain", "c0ffe")  # too short for an id
    cli("umount", tree)


def test_explain_of_a_direct_mount_is_one_line(cli: Cli, snapshot, tmp_path):
    cli("warm", "--plain-http", "--progress", "none", snapshot)
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", snapshot, tree)
    (mounted,) = cli("mounts", "--format", "json").json["mounts"]
    if not mounted["direct"]:
        cli("umount", tree)
        pytest.skip("this kernel mounts EROFS from block devices only")
    out = cli("explain", tree).out
    assert len(out.splitlines()) == 1 and "no read can wait" in out
    assert cli("explain", tree, "--format", "json").json["direct"] is True
    assert "no read waits" in cli("explain", tree, "--format", "html").out
    cli("umount", tree)


def test_what_is_refused(cli: Cli, tmp_path, address):
    cli.fails(4, "explain", tmp_path)
    cli.fails(4, "explain", tmp_path / "missing")
    cli.fails(4, "explain", "sha256:" + "0" * 64)
    cli.fails(2, "explain", tmp_path, "--format", "xml")
    for bad in ("nonsense", "1.2.3.4", "127.0.0.1:0", "127.0.0.1:99999", "::1:80", "[]:80"):
        cli.fails(2, "daemon", "run", "--metrics", bad)
    with socket.socket() as taken:
        host, port = address.split(":")
        taken.bind((host, int(port)))
        taken.listen()
        cli.fails(10, "daemon", "run", "--metrics", address, hint=False)
    assert not (cli.run_dir / "control.sock").exists()
    with node_daemon(cli):
        cli.fails(4, "explain", "sha256:" + "0" * 64)


def test_a_browser_shows_the_page(cli: Cli, snapshot, registry, tmp_path):
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", snapshot, tree)
    (tree / "f05").read_bytes()
    found = cli("explain", tree, "--format", "json").json
    page = tmp_path / "start.html"
    cli("explain", tree, "--format", "html", "-o", page)
    cli("umount", tree)
    shown = dom(page, tmp_path / "browser")
    assert shown.count("<rect ") == len(found["stalls"]) > 0
    assert "/f05" in shown and registry.address in shown


def test_a_browser_takes_hostile_names_as_text(tmp_path):
    stalls = [stall(name, error=name, sources=(name,)) for name in HOSTILE]
    path = tmp_path / "page.html"
    path.write_text(html_page(explanation(*stalls, repository=HOSTILE[0])))
    shown = dom(path, tmp_path / "profile")
    assert set(re.findall(r"<([a-z0-9]+)", shown)) <= KNOWN
    assert shown.count("<rect ") == len(HOSTILE)
    assert not re.search(r"<[^>]* on\w+=", shown)


def test_explain_tells_what_a_boot_pack_brought_and_missed(cli: Cli, snapshot, registry, tmp_path):
    """f01 is in the pack, f09 is not; both are read from a cold cache."""
    traced = tmp_path / "traced"
    cli("mount", "--plain-http", snapshot, traced)
    (traced / "f01").read_bytes()
    cli("trace", "--mounted", traced, "-o", tmp_path / "trace.json")
    cli("umount", traced)
    cli("optimize", "--plain-http", snapshot, "--trace", tmp_path / "trace.json", "--name", "one")
    shutil.rmtree(cli.cache / "v1")
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", "--boot-pack", "one", snapshot, tree)
    (tree / "f01").read_bytes()
    (tree / "f09").read_bytes()
    found = cli("explain", tree, "--format", "json").json
    text = cli("explain", tree).out
    cli("umount", tree)
    by_path = {
        name: [s for s in found["stalls"] if name in s["paths"]] for name in ("/f01", "/f09")
    }
    assert all(stall["sources"] in (["pack"], ["cache"]) for stall in by_path["/f01"])
    assert [stall for stall in by_path["/f09"] if stall["sources"] == [registry.address]]
    pack = found["boot_pack"]
    assert pack["statistics"]["requests"] == 1 and pack["statistics"]["blocks"] >= SIZE // 4096
    assert pack["covered"] + pack["missed"] == len(found["stalls"])
    assert pack["missed"] >= len(by_path["/f09"]) and pack["missed_bytes"] >= SIZE
    assert "boot pack  brought" in text and "a new one  would save" in text
