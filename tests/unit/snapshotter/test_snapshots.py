"""What the conformance suite, which asks through gRPC, cannot see."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.errors import AlreadyExists, Busy, ImgsnapError, InvalidArgument, NotFound
from imgsnap.snapshotter import serve
from imgsnap.snapshotter.labels import GID_MAPPING, UID_MAPPING
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.report import check_root, usage_by_state
from imgsnap.snapshotter.rows import Usage, WrongState
from tests.support.remote_parts import labels_of
from tests.support.snapshots_client import SnapshotsClient, code
from tests.unit.snapshotter.conftest import APP, Core


def test_the_root_of_a_user_namespace_owns_its_tree(core: Core):
    if os.geteuid():
        pytest.skip("chown needs root")
    labels = {UID_MAPPING: "0:100000:65536", GID_MAPPING: "0:200000:65536"}
    core.snapshots.prepare("a", "", labels)
    status = core.directories.fs(core.snapshots.stat("a").id).stat()
    assert (status.st_uid, status.st_gid) == (100000, 200000)
    with pytest.raises(InvalidArgument):
        core.snapshots.prepare("b", "", {UID_MAPPING: "nonsense"})
    assert len(core.snapshots.list([])) == 1


def test_an_upper_has_the_mode_of_the_root_beneath(core: Core):
    core.snapshots.prepare("a", "", {})
    core.directories.fs(core.snapshots.stat("a").id).chmod(0o1711)
    core.snapshots.commit("c", "a", {})
    core.snapshots.prepare("b", "c", {})
    assert core.directories.fs(core.snapshots.stat("b").id).stat().st_mode & 0o7777 == 0o1711


def test_what_the_state_forbids(core: Core):
    core.snapshots.prepare("a", "", {})
    core.snapshots.view("v", "", {})
    core.snapshots.commit("c", "a", {})
    core.snapshots.prepare("b", "c", {})
    for call in (
        lambda: core.snapshots.remove("c"),
        lambda: core.snapshots.mounts("c"),
        lambda: core.snapshots.commit("x", "v", {}),
        lambda: core.snapshots.commit("x", "c", {}),
    ):
        with pytest.raises(WrongState):
            call()
    with pytest.raises(InvalidArgument):
        core.snapshots.prepare("x", "b", {})
    for call in (core.snapshots.remove, core.snapshots.stat, core.snapshots.usage):
        with pytest.raises(NotFound):
            call("missing")
    assert len(core.snapshots.list([])) == 3


def test_no_rebase(core: Core):
    core.snapshots.prepare("a", "", {})
    core.snapshots.commit("base", "a", {})
    core.snapshots.prepare("b", "", {})
    with pytest.raises(InvalidArgument):
        core.snapshots.commit("c", "b", {}, "base")
    core.snapshots.prepare("d", "base", {})
    core.snapshots.commit("e", "d", {}, "base")


def test_one_of_many_wins(core: Core):
    start = threading.Barrier(8)

    def prepare(_: int) -> bool:
        start.wait()
        try:
            core.snapshots.prepare("key", "", {})
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(prepare, range(8))) == 1
    core.snapshots.cleanup()
    assert len(list((core.root / "snapshots").iterdir())) == 1
    assert check_root(core.root).problems == ()


def test_commit_does_not_walk(core: Core, monkeypatch: pytest.MonkeyPatch):
    """The measuring is done by another thread, and by whoever asks before it is done."""
    asked = threading.Event()
    go_on = threading.Event()
    measure = core.directories.usage

    def slow(row_id: int):
        if threading.current_thread() is not threading.main_thread():
            asked.set()
            assert go_on.wait(30)
        return measure(row_id)

    monkeypatch.setattr(core.directories, "usage", slow)
    core.snapshots.prepare("a", "", {})
    core.snapshots.commit("c", "a", {})
    assert asked.wait(30)
    assert core.snapshots.stat("c").usage is None
    assert core.snapshots.usage("c").inodes == 1
    go_on.set()


def test_what_a_killed_process_did_not_measure_is_measured(root: Path):
    with serve.opened(root) as snapshots:
        snapshots.prepare("a", "", {})
        snapshots.commit("c", "a", {})
    with closing(Ledger.open(root)) as ledger, ledger.change() as changes:
        changes.update(replace(ledger.get("c"), usage=None))
    with serve.opened(root) as snapshots:
        snapshots._background.submit(lambda: None).result(60)  # it comes after the measuring
        assert snapshots.stat("c").usage == Usage(snapshots.usage("c").size, 1)


def test_a_lost_directory_is_an_error_and_never_an_empty_layer(core: Core):
    core.snapshots.prepare("a", "", {})
    core.snapshots.commit("c", "a", {})
    row = core.snapshots.stat("c")
    core.directories.drop(row.id)
    with pytest.raises((ImgsnapError, OSError)):
        core.snapshots.prepare("b", "c", {})
    assert check_root(core.root).problems == (f"c: its directory snapshots/{row.id} is missing",)
    assert [row.name for row in core.snapshots.list([])] == ["c"]
    core.snapshots.recover()
    core.snapshots.remove("c")


def test_check_sees_what_does_not_belong_together(core: Core):
    core.snapshots.prepare("a", "", {})
    (core.root / "snapshots/99").mkdir()
    (core.root / "snapshots/new-x").mkdir()
    report = check_root(core.root)
    assert report.problems == (
        "snapshots/99 is of no snapshot",
        "snapshots/new-x is of no snapshot",
    )
    core.snapshots.recover()
    assert check_root(core.root).problems == ()


def test_usage_by_state(core: Core):
    core.snapshots.prepare("a", "", {})
    core.snapshots.commit("c", "a", {})
    core.snapshots.prepare("b", "c", {})
    core.snapshots.view("v", "c", {})
    core.snapshots.remove("v")
    found = usage_by_state(core.root)
    assert {state: count for state, (count, _) in found.items()} == {
        "layer": 1,
        "active": 1,
        "removed": 1,
    }
    assert found["layer"][1].inodes == 3  # the directory, fs, work


def test_one_process_at_a_time(root: Path):
    with serve.opened(root), pytest.raises(Busy), serve.opened(root):
        pass
    with serve.opened(root):
        pass


def test_the_socket_is_for_root_only(root: Path):
    with serve.opened(root / "state") as snapshots:
        server = serve.start_server(snapshots, root / "sub/s.sock")
        try:
            assert (root / "sub/s.sock").stat().st_mode & 0o777 == 0o600
        finally:
            server.stop(0).wait()


def test_a_socket_that_cannot_be(root: Path):
    with serve.opened(root / "state") as snapshots, pytest.raises(InvalidArgument):
        serve.start_server(snapshots, root / ("x" * 120))


def test_calls_that_wait_for_a_registry_stop_no_others(core: Core, root: Path):
    """More of them than threads, and a device that nobody can show."""
    go_on = threading.Event()
    show = core.devices.show

    def waits(repository: str, snapshot):
        assert go_on.wait(60)
        return show(repository, snapshot)

    server = serve.start_server(core.snapshots, root / "s.sock")
    client = SnapshotsClient(root / "s.sock")
    try:
        client.prepare("extract")
        core.devices.show = waits  # type: ignore[method-assign]
        count = serve.WAITING_THREADS + serve.THREADS + 8
        with ThreadPoolExecutor(count) as threads:
            pulls = [
                threads.submit(client.prepare, f"x{n}", "", labels_of(APP, 0)) for n in range(count)
            ]
            try:
                client.commit("layer", "extract")
                assert client.stat("layer").name == "layer"
                client.remove("layer")
                assert not any(pull.done() for pull in pulls)
            finally:
                go_on.set()
            for pull in pulls:
                with code("ALREADY_EXISTS"):
                    pull.result(60)
    finally:
        client.close()
        server.stop(0).wait()
