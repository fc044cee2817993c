"""`imgsnap attach`: a snapshot as a file for VMMs."""

import errno
import fcntl
import json
import mmap
import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from imgsnap.blockstore.cache_pins import pins
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.mount import linux
from imgsnap.mount.linux import MountFlag, UmountFlag
from imgsnap.mount.process import ProcessId
from imgsnap.node.client import attach
from imgsnap.node.daemon import WATCH_S
from imgsnap.node.request import AttachRequest
from imgsnap.node.source import Source
from imgsnap.oci.locate import reference_of
from imgsnap.oci.reference import parse_location
from imgsnap.units import MIB
from tests.support.cli import Cli
from tests.support.image_builder import image, write_layout
from tests.support.node import Node, node_daemon, wait_for
from tests.support.samples import many_files, noise

pytestmark = pytest.mark.root

FILES, SIZE = 8, 300_000
F_OFD_SETLK = 37
"""include/uapi/asm-generic/fcntl.h; Python's fcntl has no such name."""


@pytest.fixture
def node(cli: Cli):
    with node_daemon(cli) as running:
        yield running


@pytest.fixture
def snapshot(cli: Cli, tmp_path):
    write_layout(tmp_path / "image", image(many_files(size=SIZE, count=FILES)))
    cli.convert(f"oci:{tmp_path}/image", "store:app")
    return "store:app"


def test_the_file_is_the_device_and_zeros(node: Node, cli: Cli, snapshot, tmp_path):
    found = cli("attach", snapshot, "--format", "json").json
    path = Path(found["path"])
    assert path.name == "layer.erofs"
    assert path.stat().st_size == found["size"] and found["size"] % (2 * MIB) == 0
    (known,) = cli("daemon", "status", "--format", "json").json["attachments"]
    raw = path.read_bytes()
    assert len(raw) == found["size"] > known["size"] and not any(raw[known["size"] :])
    target = tmp_path / "disk"
    target.mkdir()
    linux.mount(str(path), target, "erofs", MountFlag.RDONLY)
    try:
        for number in range(FILES):
            assert (target / f"f{number:02}").read_bytes() == noise(SIZE, number)
    finally:
        linux.umount(target, UmountFlag(0))
    assert cli("attach", snapshot).out.strip() == str(path), "one for all"
    assert [a["id"] for a in cli("attachments", "--format", "json").json["attachments"]] == [
        found["id"]
    ]
    cli("detach", found["id"][:12])
    assert not path.exists() and cli("attachments", "--format", "json").json["attachments"] == []


def test_detach_waits_for_nobody_and_takes_nothing_away(node: Node, cli: Cli, snapshot, tmp_path):
    path = cli("attach", snapshot).out.strip()
    tree = tmp_path / "tree"
    cli("mount", snapshot, tree)  # beside it, with a page cache of its own
    with open(path, "rb", buffering=0) as file:
        first = file.read(4096)
        assert str(os.getpid()) in cli.fails(10, "detach", path)
        assert cli("info", path, "--format", "json").json["processes"] == [os.getpid()]
        cli("detach", "--lazy", path)
        assert not Path(path).exists()
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file.fileno(), 4096, 0) == first
    assert (tree / "f01").read_bytes() == noise(SIZE, 1)
    cli("umount", tree)
    cli.fails(4, "detach", path)


def test_a_killed_server_is_no_matter_for_who_reads_the_file(node: Node, cli: Cli, snapshot):
    path = cli("attach", snapshot).out.strip()
    whole = Path(path).read_bytes()
    with open(path, "rb", buffering=0) as file:
        node.kill(node.server())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == whole
    wait_for(node.server, "the next server")
    cli("detach", path)


def test_each_attachment_has_its_own_pin(node: Node, cli: Cli, snapshot, tmp_path):
    """The file's end must not leave the tree, which is still mounted, to eviction."""

    def pinned() -> set[str]:
        return {pin.holder for pin in pins(NodeCache(cli.cache)).pins}

    tree = tmp_path / "tree"
    cli("mount", snapshot, tree)
    wait_for(lambda: len(pinned()) == 1, "the tree's pin")
    path = cli("attach", snapshot).out.strip()
    wait_for(lambda: len(pinned()) == 2, "the file's pin")
    cli("detach", path)
    assert len(pinned()) == 1
    cli("umount", tree)
    assert not pinned()


def test_what_a_killed_process_had_goes_without_it(node: Node, cli: Cli, snapshot):
    request = AttachRequest(Source(snapshot, cli.store), reference_of(parse_location(snapshot)))
    process = subprocess.Popen(["sleep", "100"])
    try:
        user = ProcessId.of(process.pid)
        path = Path(attach(request, cli.run_dir, cli.cache, process=user)["path"])
        assert path.exists()
        time.sleep(2 * WATCH_S)
        assert path.exists()
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not path.exists(), "the end of the attachment")
    assert cli("attachments", "--format", "json").json["attachments"] == []


def test_what_is_refused(node: Node, cli: Cli, snapshot):
    cli.fails(4, "attach", "store:missing")
    cli.fails(4, "detach", "0" * 64)
    cli.fails(4, "detach", "../..")
    cli.fails(4, "info", "1234567")
    assert "maps a file" in cli.fails(
        2, "attach", "--via", "ublk", "--format", "firecracker-pmem", snapshot
    )


def test_without_a_daemon_one_is_started(cli: Cli, snapshot):
    assert cli("attachments", "--format", "json").json["attachments"] == []
    cli.fails(4, "detach", "1234567")
    drive = json.loads(cli("attach", snapshot, "--format", "firecracker").out)
    assert Path(drive["path_on_host"]).exists()
    cli("detach", drive["path_on_host"])
    cli("daemon", "stop")


@pytest.mark.skipif(Path("/dev/ublk-control").exists(), reason="this kernel has the driver")
def test_a_disk_without_the_driver(node: Node, cli: Cli, snapshot):
    said = cli.fails(8, "attach", "--via", "ublk", snapshot)
    assert "no ublk driver" in said and "CONFIG_BLK_DEV_UBLK" in said and "--via fuse" in said
    cli.fails(2, "attach", "--ublk-id", "3", snapshot, hint=False)
    assert cli("attachments", "--format", "json").json["attachments"] == []


def test_a_jailed_process_of_another_user_reads_it(node: Node, cli: Cli, snapshot, tmp_path):
    """As Firecracker's jailer has it: a bind mount below a chroot, and no privileges."""
    path = Path(cli("attach", snapshot).out.strip())
    whole, jail = path.read_bytes(), tmp_path / "jail"
    inside = jail / path.name  # under the same name: `detach` finds users by it
    jail.mkdir()
    inside.touch()
    linux.mount(str(path), inside, "none", MountFlag.BIND)
    try:
        assert in_jail(jail, lambda: read_as_vmms(f"/{path.name}", whole)) == 0
        with inside.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            assert str(os.getpid()) in cli.fails(10, "detach", path)
        node.kill(node.server())
        assert in_jail(jail, lambda: read_as_vmms(f"/{path.name}", whole)) == 0
        assert in_jail(jail, lambda: os.open(f"/{path.name}", os.O_RDWR)) == JAIL_FAILED
    finally:
        linux.umount(inside, UmountFlag(0))
    cli("detach", path)


JAIL_FAILED = 9
NOBODY = 54321


def in_jail(root: Path, what) -> int:
    """Runs it in a process of nobody's whose root is `root`; its exit status."""
    pid = os.fork()
    if pid == 0:
        try:
            os.chroot(root)
            os.chdir("/")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            what()
        except OSError as error:
            os._exit(JAIL_FAILED if error.errno in (errno.EACCES, errno.EROFS) else 1)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def read_as_vmms(path: str, whole: bytes) -> None:
    """Read-only: by reads, by a shared mapping (virtio-pmem), locked as Cloud Hypervisor does."""
    fd = os.open(path, os.O_RDONLY)
    lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, len(whole), 0)
    fcntl.fcntl(fd, F_OFD_SETLK, lock)
    with mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ) as mapped:
        assert mapped[:] == whole
    assert os.pread(fd, len(whole), 0) == whole
