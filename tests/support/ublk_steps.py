"""What tests/integration/test_ublk.py runs in its guest: `python ublk_steps.py STEP`.

A step fails by an exception; what it prints is for the report. Steps leave nothing attached.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import mmap
import os
import random
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from imgsnap.errors import AccessDenied, Unavailable
from imgsnap.mount import linux
from imgsnap.mount.linux import MountFlag
from imgsnap.node import rpc
from imgsnap.node.places import NodePlaces
from imgsnap.ublk.control import UblkControl
from imgsnap_cli.main import main

APP, BIG = "store:app", "store:big"
MODELS = {APP: Path("/srv/app.raw"), BIG: Path("/srv/big.raw")}
"""The same devices, read elsewhere."""
PLACES = NodePlaces(Path("/run/imgsnap"))
WAIT_S = 40.0
_BLKFLSBUF = 0x1261


# Tools -------------------------------------------------------------------------------------------


def cli(*arguments: str, code: int = 0) -> str:
    """Runs a command here; its output, or what it wrote about its failure."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    assert status == code, (arguments, status, out.getvalue(), err.getvalue())
    return out.getvalue().strip() if not code else err.getvalue()


def attach(name: str, *options: str) -> Path:
    return Path(cli("attach", "--via", "ublk", name, *options))


@contextlib.contextmanager
def attached(name: str, *options: str) -> Iterator[Path]:
    path = attach(name, *options)
    try:
        yield path
    finally:
        if path.exists():
            cli("detach", str(path))
    assert not path.exists()


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    target = Path("/mnt/disk")
    target.mkdir(exist_ok=True)
    linux.mount(str(path), target, "erofs", MountFlag.RDONLY)
    try:
        yield target
    finally:
        linux.umount(target)


def wait_for(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what}: not within {WAIT_S} s")


def server() -> int | None:
    """The block server's pid."""
    try:
        return int(rpc.call(PLACES.server.block_socket, "status", timeout_s=5)["pid"])
    except Unavailable:
        return None


def kernel_log() -> list[str]:
    with open("/dev/kmsg", "rb", buffering=0) as log:
        os.set_blocking(log.fileno(), False)
        lines = []
        while True:
            try:
                lines.append(os.read(log.fileno(), 8192).decode(errors="replace"))
            except BlockingIOError:
                return lines


def io_errors() -> list[str]:
    return [line for line in kernel_log() if "I/O error" in line or "Buffer I/O" in line]


def tree_digest(root: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


class Reader:
    """Reads of a disk that go past the page cache, compared with the model."""

    def __init__(self, disk: Path, model: bytes, seed: int) -> None:
        self._fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, 1 << 17)
        self._model = model
        self._random = random.Random(seed)
        self.reads = 0

    def once(self) -> None:
        size = self._random.choice((512, 4096, 16384, 1 << 17))
        offset = self._random.randrange(0, len(self._model) - size) // 512 * 512
        view = memoryview(self._buffer)[:size]
        assert os.preadv(self._fd, [view], offset) == size
        assert view == self._model[offset : offset + size], f"wrong bytes at {offset}"
        self.reads += 1

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)


def read_in_threads(disk: Path, model: bytes, count: int, each: int) -> list[threading.Thread]:
    """Threads that read until `each` reads; a failure is kept in FAILURES."""

    def run(seed: int) -> None:
        try:
            with Reader(disk, model, seed) as reader:
                while reader.reads < each:
                    reader.once()
        except BaseException as error:
            FAILURES.append(error)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(count)]
    for thread in threads:
        thread.start()
    return threads


FAILURES: list[BaseException] = []


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "a read does not return"
    assert not FAILURES, FAILURES


# Steps -------------------------------------------------------------------------------------------


def mount_and_compare() -> None:
    with attached(APP) as disk, mounted(disk) as tree:
        print("tree", tree_digest(tree))
    assert not io_errors()


def disk_is_the_device() -> None:
    with attached(APP) as disk:
        reads = Path(f"/sys/block/{disk.name}/stat").read_text().split()[0]
        assert reads == "0", "the kernel looks for partitions"
        model = MODELS[APP].read_bytes()
        assert len(model) % (2 << 20) == 0
        assert disk.read_bytes() == model
        assert cli("attach", "--via", "ublk", APP) == str(disk), "one for all"
        name = disk.name
        assert Path(f"/sys/block/{name}/ro").read_text().strip() == "1"
        try:
            with disk.open("r+b", buffering=0) as device:
                device.write(bytes(4096))
        except PermissionError as error:
            print("writing:", error.strerror)
        else:
            raise AssertionError("it can be written")
        assert str(disk) in cli("attachments")
        file = cli("attach", APP)
        assert file.endswith("layer.erofs") and file != str(disk)
        cli("detach", file)


def parallel_reads() -> None:
    with attached(BIG) as disk:
        join(read_in_threads(disk, MODELS[BIG].read_bytes(), 8, 40))
    assert not io_errors()


def idle_memory_is_given_back() -> None:
    def resident() -> int:
        """KiB of the server's own memory."""
        text = Path(f"/proc/{server()}/status").read_text()
        return int(text.partition("RssAnon:")[2].split()[0])

    with attached(BIG) as disk:
        model = MODELS[BIG].read_bytes()
        join(read_in_threads(disk, model, 8, 20))
        used = resident()
        wait_for(lambda: resident() < used - 256, "the buffers' end")
        print(f"{used} KiB, idle {resident()} KiB")
        join(read_in_threads(disk, model, 2, 5))


def killed_with_reads_in_flight() -> None:
    with attached(BIG) as disk:
        model = MODELS[BIG].read_bytes()
        inflight = Path(f"/sys/block/{disk.name}/inflight")
        with disk.open("rb") as device:
            fcntl.ioctl(device, _BLKFLSBUF)
        threads = read_in_threads(disk, model, 8, 60)
        for _ in range(3):
            old = wait_for(server, "a server")
            wait_for(lambda: int(inflight.read_text().split()[0]) > 2, "reads in flight")
            os.kill(old, signal.SIGKILL)
            begin = time.monotonic()
            with Reader(disk, model, 99) as reader:
                reader.once()
            print(f"recovery {time.monotonic() - begin:.3f} s")
            assert wait_for(server, "the next server") != old
        join(threads)
    assert not io_errors(), io_errors()
    log = PLACES.server.log.read_text()
    assert log.count(f"took over {disk}") == 3, log


def stopped_server_stalls_and_loses_nothing() -> None:
    """Requests that the server has not even seen when it is killed."""
    with attached(APP) as disk:
        model = MODELS[APP].read_bytes()
        pid = wait_for(server, "a server")
        os.kill(pid, signal.SIGSTOP)
        threads = read_in_threads(disk, model, 4, 3)
        inflight = Path(f"/sys/block/{disk.name}/inflight")
        wait_for(lambda: int(inflight.read_text().split()[0]) == 4, "reads in flight")
        os.kill(pid, signal.SIGKILL)
        join(threads)
    assert not io_errors(), io_errors()


def daemon_killed_whole() -> None:
    """Supervisor, control process and server die; the next daemon takes the disk over."""
    disk = attach(APP)
    model = MODELS[APP].read_bytes()
    status = rpc.call(PLACES.control_socket, "status")
    pids = [status["pid"], status["supervisor"]["pid"], status["supervisor"]["server"]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    threads = read_in_threads(disk, model, 2, 3)
    assert attach(APP) == disk
    join(threads)
    with mounted(disk) as tree:
        print("tree", tree_digest(tree))
    cli("detach", str(disk))
    assert not io_errors(), io_errors()


def detach_while_in_use() -> None:
    disk = attach(APP)
    with mounted(disk) as tree:
        assert "is mounted on /mnt/disk" in cli("detach", str(disk), code=10)
        assert "is mounted" in cli("daemon", "stop", code=10)
    with disk.open("rb"):
        assert f"open in process {os.getpid()}" in cli("detach", str(disk), code=10)
    with mounted(disk) as tree:
        cli("detach", "--lazy", str(disk))
        assert cli("attachments", "--format", "json").count("ublk") == 0
        other = attach(APP)
        assert other != disk
        os.kill(wait_for(server, "a server"), signal.SIGKILL)
        with disk.open("rb") as device:
            fcntl.ioctl(device, _BLKFLSBUF)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        print("tree", tree_digest(tree))
        assert disk.exists()
    wait_for(lambda: not disk.exists(), "the disk's end")
    assert other.exists() and str(other) in cli("attachments")
    cli("detach", str(other))
    assert not other.exists()
    assert not io_errors(), io_errors()


def number_taken() -> None:
    with attached(APP, "--ublk-id", "7") as disk:
        assert disk == Path("/dev/ublkb7")
        assert "ublk device 7 is taken" in cli(
            "attach", "--via", "ublk", "--ublk-id", "7", BIG, code=7
        )
        assert "as /dev/ublkb7" in cli("attach", "--via", "ublk", "--ublk-id", "8", APP, code=7)
    cli("attach", "--ublk-id", "7", APP, code=2)


def not_root() -> None:
    child = os.fork()
    if not child:
        os.setuid(1000)
        try:
            UblkControl()
        except AccessDenied as error:
            os._exit(0 if "fuse" in str(error.hint) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def a_jails_node_of_another_user() -> None:
    """As Firecracker's jailer has devices: mknod below a chroot, owned by who may open it."""
    jail, user, wanted = Path("/tmp/jail"), 54321, MODELS[APP].read_bytes()
    jail.mkdir()
    with attached(APP) as disk:
        os.mknod(jail / "disk", stat.S_IFBLK | 0o400, disk.stat().st_rdev)
        os.chown(jail / "disk", user, user)
        pid = os.fork()
        if pid == 0:
            os.chroot(jail)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            same = Path("/disk").read_bytes() == wanted
            os._exit(0 if same else 1)
        assert os.waitpid(pid, 0)[1] == 0
    (jail / "disk").unlink()
    jail.rmdir()


def stop_takes_disks_away() -> None:
    disk = attach(APP)
    device = os.open(disk, os.O_RDONLY)
    assert "open in process" in cli("daemon", "stop", code=10)
    cli("daemon", "stop", "--force")
    assert not disk.exists()
    os.close(device)
    wait_for(lambda: not list(Path("/sys/class/ublk-char").iterdir()), "the number's return")


def no_driver() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(AssertionError):
        cli("daemon", "stop", "--force")
    wait_for(lambda: libc.syscall(176, b"ublk_drv", os.O_NONBLOCK) == 0, "the driver's end")
    said = cli("attach", "--via", "ublk", APP, code=8)
    assert "no ublk driver" in said and "CONFIG_BLK_DEV_UBLK" in said and "--via fuse" in said
    file = Path(cli("attach", APP))
    assert file.read_bytes() == MODELS[APP].read_bytes()
    cli("detach", str(file))
    cli("daemon", "stop")


if __name__ == "__main__":
    started = time.monotonic()
    globals()[sys.argv[1]]()
    print(f"{sys.argv[1]}: {time.monotonic() - started:.1f} s")
