"""Mounting with a server process of its own, and what is left afterwards: nothing."""

import errno
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.errors import (
    AlreadyExists,
    Busy,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from imgsnap.fuse.session import FuseSession
from imgsnap.mount import linux
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc
from imgsnap.node.client import mounts
from imgsnap.node.request import AttachRequest
from imgsnap.node.session import mount_snapshot, unmount
from imgsnap.node.source import Source
from imgsnap.node.targets import MountOptions
from tests.support.memory_repository import MemoryRepository
from tests.support.mounts import mounted
from tests.support.readers import compare_in_parallel, listing
from tests.support.snapshots import build_snapshot, erofs_image, make_tree, random_device

pytestmark = pytest.mark.root

SOURCE = Source("store:unused", Path("/nonexistent"))
"""The tests hand the repository itself to the server."""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), seed=2)


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    return build_snapshot(erofs_image(tree, tmp_path_factory.mktemp("image") / "x.erofs"))


@pytest.fixture
def repository(built):
    return MemoryRepository(built)


class Site:
    """A run directory of one test, and the servers that were started in it."""

    def __init__(self, root):
        self.root = root
        self.run_dir = root / "run"
        self.servers = []

    def options(self, reference="latest", **changes):
        request = AttachRequest(SOURCE, reference)
        options = MountOptions(request, self.root / "mnt", self.run_dir, self.root / "cache")
        return replace(options, **changes)

    def mount(self, repository, **changes):
        record = mount_snapshot(self.options(**changes), lambda source: repository)
        self.servers.append(record.server)
        return record

    def unmount(self, name="mnt", **options):
        unmount(self.root / name, self.run_dir, **options)

    def leftovers(self):
        found = [str(p.target) for p in linux.mount_points() if self.root in p.target.parents]
        found += [f"process {server.pid}" for server in self.servers if server.alive]
        found += [str(path) for path in self.run_dir.glob("*/*")]
        found += [str(path) for path in self.root.glob("*/rw/*")]
        return found


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    left = made.leftovers()
    for server in made.servers:
        server.end(5)
    for point in reversed([p for p in linux.mount_points() if tmp_path in p.target.parents]):
        linux.umount(point.target, linux.UmountFlag.DETACH)
    assert left == []


def memory_kib(pid, field):
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise AssertionError(field)


def test_mount_read_unmount(site, repository, tree):
    record = site.mount(repository)
    server = server_of(record)
    assert Path(f"/proc/{server.pid}/comm").read_text() == "imgsnap-block\n"
    before = memory_kib(server.pid, "VmRSS")  # a copy of pytest's memory is in it
    assert listing(site.root / "mnt") == listing(tree)
    compare_in_parallel(tree, site.root / "mnt")
    assert memory_kib(server.pid, "VmRSS") - before < 40 << 10
    assert [found.target for found, served in mounts(site.run_dir) if served] == [
        str(site.root / "mnt")
    ]
    assert record.server.alive
    assert Path(f"/proc/{record.server_pid}/comm").read_text() == "imgsnap-super\n"
    assert os.getsid(record.server_pid) != os.getsid(0)
    with pytest.raises(OSError) as caught:
        (site.root / "mnt/new").write_text("x")
    assert caught.value.errno == errno.EROFS
    site.unmount()
    assert not (site.root / "mnt").exists(), "we made it, we remove it"
    assert mounts(site.run_dir) == []


def test_a_target_that_was_there_stays(site, repository):
    (site.root / "mnt").mkdir()
    (site.root / "mnt/kept").write_text("below")
    site.mount(repository)
    assert not (site.root / "mnt/kept").exists()
    site.unmount()
    assert (site.root / "mnt/kept").read_text() == "below"


@pytest.mark.parametrize("name", ["plain", "with,comma", "with:colon", "back\\slash", "a b\n,:\\"])
def test_a_writable_tree_on_odd_paths(site, repository, tree, name):
    target = site.root / f"t-{name}"
    cache = site.root / f"c-{name}"
    record = site.mount(repository, target=target, cache_dir=cache, read_write=True)
    assert listing(target) == listing(tree)
    (target / "etc/conf.d/new").write_text("added")
    (target / "usr/lib/module001.py").unlink()
    with (target / "usr/lib/module002.py").open("ab") as file:
        file.write(b"!")
    expected = (tree / "usr/lib/module002.py").read_bytes() + b"!"
    assert (target / "usr/lib/module002.py").read_bytes() == expected
    assert os.path.exists(record.rw_dir)
    unmount(target, site.run_dir)
    assert not os.path.exists(record.rw_dir)
    site.mount(repository, target=target, cache_dir=cache)
    assert listing(target) == listing(tree)
    unmount(target, site.run_dir)


def test_overlay_on_overlay_is_refused(site, repository):
    for name in ("low", "up", "work", "merged"):
        (site.root / name).mkdir()
    options = f"lowerdir={site.root}/low,upperdir={site.root}/up,workdir={site.root}/work"
    with mounted("none", site.root / "merged", "overlay", 0, options):
        with pytest.raises(Unsupported, match="on overlayfs"):
            site.mount(repository, read_write=True, rw_root=site.root / "merged/rw")
        assert os.listdir(site.root / "merged/rw") == []


def test_failed_mounts_raise_what_the_server_met_and_leave_nothing(site, repository, built):
    junk = build_snapshot(random_device(100))
    repository.add(junk, tag="junk")
    with pytest.raises(NotFound, match="no manifest missing") as caught:
        site.mount(repository, reference="missing")
    assert caught.value.exit_code == 4
    with pytest.raises(ImgsnapError, match="erofs"):
        site.mount(repository, reference="junk")
    repository.faults.corrupt = 1
    with pytest.raises(IntegrityError):
        site.mount(repository)
    repository.faults.corrupt = 0
    repository.faults.away = 1
    with pytest.raises(Unavailable, match="does not answer"):
        site.mount(repository)

    def broken(source):
        raise RuntimeError("no such registry")

    with pytest.raises(ImgsnapError, match="RuntimeError: no such registry"):
        mount_snapshot(site.options(), broken)
    with pytest.raises(ImgsnapError, match="died"):
        mount_snapshot(site.options(), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(Unavailable, match="in time"):
        mount_snapshot(site.options(mount_timeout_s=0.3), lambda _: time.sleep(60))
    (site.root / "file").write_text("")
    with pytest.raises(InvalidArgument):
        site.mount(repository, target=site.root / "file")
    with pytest.raises(NotFound):
        site.mount(repository, target=site.root / "no/such/parent")
    assert not (site.root / "mnt").exists()
    assert site.leftovers() == []


def test_a_target_is_mounted_once(site, repository):
    site.mount(repository)
    with pytest.raises(AlreadyExists, match="already shows"):
        site.mount(repository)
    site.unmount()
    with pytest.raises(NotFound):
        site.unmount()


def test_many_processes_mount_one_target_and_one_wins(site, repository):
    outcomes = []

    def attempt():
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            code = b"x"
            try:
                site.mount(repository)
                code = b"m"
            except (AlreadyExists, Busy):
                code = b"a"
            finally:
                os.write(writer, code)
                os._exit(0)
        os.close(writer)
        outcomes.append(os.read(reader, 1))
        os.close(reader)
        os.waitpid(child, 0)

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == [b"a", b"a", b"a", b"m"]
    site.unmount()


def server_of(record):
    """The process that answers reads now."""
    status = rpc.call(record.server_dir / "block.sock", "status")
    return ProcessId.of(status["pid"])


def test_a_killed_server_is_replaced_and_readers_get_their_bytes(site, repository, tree):
    repository.faults.latency_ms = 50
    record = site.mount(repository)
    expected = (tree / "usr/lib/big.bin").read_bytes()
    got = []
    reader = threading.Thread(
        target=lambda: got.append((site.root / "mnt/usr/lib/big.bin").read_bytes())
    )
    reader.start()
    killed = set()
    while reader.is_alive() and len(killed) < 3:
        server = server_of(record)
        killed.add(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        time.sleep(0.05)
    reader.join(20)
    assert got == [expected]
    assert len(killed) == 3
    compare_in_parallel(tree, site.root / "mnt")
    assert record.server.alive
    site.unmount()


def test_a_kernel_that_cannot_resend_fails_readers_and_does_not_hang_them(
    site, repository, monkeypatch
):
    monkeypatch.setattr(FuseSession, "resends", property(lambda session: False))
    repository.faults.latency_ms = 250
    record = site.mount(repository)
    failures = []

    def read():
        try:
            (site.root / "mnt/usr/lib/big.bin").read_bytes()
        except OSError as error:
            failures.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.1)
    os.kill(server_of(record).pid, signal.SIGKILL)
    reader.join(20)
    assert not reader.is_alive(), "a reader must not hang"
    assert len(failures) == 1
    assert record.server.wait(10), "the supervisor takes the mount away"
    assert site.leftovers() == []


def test_without_its_supervisor_a_server_goes_on(site, repository, tree):
    record = site.mount(repository)
    server = server_of(record)
    os.kill(record.server_pid, signal.SIGKILL)
    assert record.server.wait(5)
    compare_in_parallel(tree, site.root / "mnt")
    site.unmount()
    assert server.wait(5)


def test_after_sigkill_of_both_readers_get_errors_and_umount_cleans_up(site, repository):
    repository.faults.latency_ms = 250
    record = site.mount(repository)
    server = server_of(record)
    failures = []

    def read():
        try:
            (site.root / "mnt/usr/lib/big.bin").read_bytes()
        except OSError as error:
            failures.append(error.errno)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.1)
    os.kill(record.server_pid, signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)
    reader.join(20)
    assert not reader.is_alive(), "a reader must not hang"
    assert len(failures) == 1
    assert record.server.wait(5)
    with pytest.raises(AlreadyExists):
        site.mount(repository)
    site.unmount()
    assert site.leftovers() == []
    site.mount(repository)
    site.unmount()


def test_a_claim_of_a_dead_process_is_taken_over(site, repository):
    child = os.fork()
    if child == 0:
        import imgsnap.node.session as session

        session.start_detached = lambda run: os._exit(7)
        try:
            site.mount(repository)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert list(site.run_dir.glob("mounts/*.json"))
    site.mount(repository)
    site.unmount()


def test_sigterm_ends_the_server_and_unmounts(site, repository):
    for busy in (False, True):
        record = site.mount(repository)
        held = os.open(site.root / "mnt/usr/lib/big.bin", os.O_RDONLY) if busy else -1
        os.kill(record.server_pid, signal.SIGTERM)
        assert record.server.wait(20)
        if busy:
            os.close(held)
        assert site.leftovers() == []


def test_a_tree_in_use_is_busy_unless_lazily_unmounted(site, repository, tree):
    record = site.mount(repository)
    with (site.root / "mnt/usr/lib/big.bin").open("rb") as file:
        with pytest.raises(Busy) as caught:
            site.unmount()
        assert caught.value.hint
        assert record.server.alive
        site.unmount(lazy=True)
        assert not (site.root / "mnt").exists()
        assert mounts(site.run_dir) == []
        again = site.mount(repository)  # the target is free at once
        assert file.read() == (tree / "usr/lib/big.bin").read_bytes()
    assert record.server.wait(20), "the last user has gone"
    assert again.server.alive
    assert listing(site.root / "mnt") == listing(tree)
    site.unmount()


def test_a_bind_mount_elsewhere_keeps_the_server(site, repository, tree):
    """The same as a container's mount namespace that holds a copy of the mount."""
    record = site.mount(repository)
    bound = site.root / "bound"
    bound.mkdir()
    linux.mount(str(site.root / "mnt"), bound, "none", linux.MountFlag.BIND)
    with pytest.raises(Busy, match="still uses the snapshot"):
        site.unmount()
    assert record.server.alive
    assert listing(bound) == listing(tree)
    linux.umount(bound)
    site.unmount()


def test_a_foreign_mount_on_top_is_not_touched(site, repository):
    site.mount(repository)
    linux.mount("none", site.root / "mnt", "tmpfs", linux.MountFlag(0), "size=64k")
    with pytest.raises(Busy, match="covered"):
        site.unmount()
    linux.umount(site.root / "mnt")
    site.unmount()


def test_the_server_keeps_none_of_our_descriptors(site, repository):
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    site.mount(repository)
    os.close(writer)
    assert os.read(reader, 1) == b"", "only we held the writing end"
    os.close(reader)
    site.unmount()


@pytest.mark.parametrize("kind", ["flip", "truncate", "zero", "lie"])
def test_a_cache_damaged_between_two_servers(site, repository, tree, kind):
    site.mount(repository)
    compare_in_parallel(tree, site.root / "mnt", readers=2)
    site.unmount()
    for path in (site.root / "cache").glob("v1/extents/*/data"):
        raw = bytearray(path.read_bytes())
        if kind == "flip":
            raw[::5000] = bytes(value ^ 1 for value in raw[::5000])
        elif kind == "truncate":
            raw = raw[: len(raw) // 2]
        else:
            raw = bytearray(len(raw))
        path.write_bytes(raw)
    site.mount(repository)
    compare_in_parallel(tree, site.root / "mnt")
    site.unmount()


def test_a_full_disk_costs_speed_not_bytes(site, repository, tree):
    (site.root / "cache").mkdir()
    with mounted("none", site.root / "cache", "tmpfs", 0, "size=600k"):
        record = site.mount(repository)
        compare_in_parallel(tree, site.root / "mnt", readers=4)
        assert record.log_path.read_text().count("serving from memory") >= 1
        site.unmount()
    with mounted("none", site.root / "cache", "tmpfs", 0, "size=64k"):
        site.mount(repository)
        compare_in_parallel(tree, site.root / "mnt", readers=2)
        site.unmount()


def test_two_servers_share_one_cache(site, repository, tree):
    for name in ("one", "two"):
        site.mount(repository, target=site.root / name)
    both = [
        threading.Thread(target=compare_in_parallel, args=(tree, site.root / name))
        for name in ("one", "two")
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    for name in ("one", "two"):
        site.unmount(name)
    repository.faults.away = 1
    site.mount(repository)  # a tag that was resolved before, and everything is here
    compare_in_parallel(tree, site.root / "mnt", readers=2)
    site.unmount()


def test_a_kernel_without_file_backed_mounts_gets_a_loop_device(
    site, repository, tree, monkeypatch, caplog
):
    really = linux.mount

    def old_kernel(source, target, fstype, flags, options=""):
        if fstype == "erofs" and not source.startswith("/dev/loop"):
            raise OSError(errno.ENOTBLK, "Block device required")
        really(source, target, fstype, flags, options)

    monkeypatch.setattr(linux, "mount", old_kernel)
    record = site.mount(repository)
    assert record.loop.startswith("/dev/loop")
    assert "using a loop device" in caplog.text
    compare_in_parallel(tree, site.root / "mnt", readers=2)
    site.unmount()
