"""The ways of one snapshot's device to its readers, measured in a guest; bench_ublk.py runs it.

`python ublk_probe.py ROUNDS`: JSON with samples for each load and way, one per round. All bytes are
in the node cache before: what is measured is the way, not the fetch. Caches are dropped
before each sample.
"""

import contextlib
import fcntl
import io
import json
import mmap
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from imgsnap.errors import Unavailable
from imgsnap.mount import linux
from imgsnap.mount.linux import MountFlag
from imgsnap.node import rpc
from imgsnap.node.places import NodePlaces
from imgsnap_cli.main import main as imgsnap

PLAIN = Path("/dev/vdb")
SEQUENTIAL = 12 << 20
REQUEST = 512 << 10
RANDOM_READS = 300
TARGET = Path("/mnt/probe")
SERVER = NodePlaces(Path("/run/imgsnap")).server.block_socket
_BLKFLSBUF = 0x1261

Sample = dict[str, float]


def main(rounds: int) -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    copy = Path("/tmp/tree.raw")
    copy.write_bytes(Path("/srv/tree.raw").read_bytes())
    ublk, file = attach("--via", "ublk"), attach()
    for path in (ublk, file):
        path.read_bytes()  # into the node cache
    ways = {"virtio-blk": PLAIN, "loop": loop(copy), "ublk": ublk, "FUSE file": file}
    # As a VMM reads: through the host's page cache of the disk or the file.
    cached = {"ublk, page cache": loop(ublk), "FUSE file, page cache": loop(file)}
    found: dict[str, list[Sample]] = {}
    for _ in range(rounds):
        for way, path in ways.items():
            for name, flag in (("direct", os.O_DIRECT), ("buffered", 0)):
                for load, run in (("sequential", sequential), ("random 4K", scattered)):
                    sample = timed(partial(run, path, flag), (ublk, file, path))
                    found.setdefault(f"{load} {name}/{way}", []).append(sample)
        for way, path in {**ways, **cached}.items():
            sample = walked(path, (ublk, file, path))
            found.setdefault(f"walk/{way}", []).append(sample)
    # Last: a new server verifies again what it reads first.
    found["recovery/ublk"] = [recovered(ublk) for _ in range(rounds)]
    print("PROBE", json.dumps(found))


def attach(*options: str) -> Path:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert imgsnap(["attach", "store:tree", *options]) == 0
    return Path(out.getvalue().strip())


def loop(file: Path) -> Path:
    """A loop device that stays as long as this process."""
    _, path = linux.attach_loop(file)
    return path


# Loads -------------------------------------------------------------------------------------------


def sequential(path: Path, flag: int) -> None:
    fd = os.open(path, os.O_RDONLY | flag)
    buffer = mmap.mmap(-1, REQUEST)
    for offset in range(0, SEQUENTIAL, REQUEST):
        assert os.preadv(fd, [buffer], offset) == REQUEST
    os.close(fd)


def scattered(path: Path, flag: int) -> None:
    fd = os.open(path, os.O_RDONLY | flag)
    if not flag:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    buffer = mmap.mmap(-1, 4096)
    pick = random.Random(1)
    for _ in range(RANDOM_READS):
        assert os.preadv(fd, [buffer], pick.randrange(SEQUENTIAL // 4096) * 4096) == 4096
    os.close(fd)


def walk(root: Path) -> None:
    """Reads every file."""
    for directory, _, names in os.walk(root):
        for name in sorted(names):
            with Path(directory, name).open("rb", buffering=0) as file:
                while file.read(1 << 17):
                    pass


# Samples -----------------------------------------------------------------------------------------


def timed(run: Any, below: tuple[Path, ...]) -> Sample:
    for path in below:
        cold(path)
    begin = time.perf_counter()
    run()
    return {"s": time.perf_counter() - begin}


def walked(path: Path, below: tuple[Path, ...]) -> Sample:
    """A walk through the mounted tree: seconds; requests to the disk, and reads that we served."""
    for cache in below:
        cold(cache)
    before = (requests(path), served())
    linux.mount(str(path), TARGET, "erofs", MountFlag.RDONLY)
    try:
        begin = time.perf_counter()
        walk(TARGET)
        took = time.perf_counter() - begin
    finally:
        linux.umount(TARGET)
    return {"s": took, "requests": requests(path) - before[0], "served": served() - before[1]}


def recovered(disk: Path) -> Sample:
    """From the kill of the server to the next read's end."""
    os.kill(int(rpc.call(SERVER, "status")["pid"]), signal.SIGKILL)
    begin = time.perf_counter()
    scattered_once(disk)
    took = time.perf_counter() - begin
    while True:
        with contextlib.suppress(Unavailable):
            rpc.call(SERVER, "status")
            return {"s": took}
        time.sleep(0.01)


def scattered_once(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
    os.close(fd)


def cold(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    if path.is_block_device():
        fcntl.ioctl(fd, _BLKFLSBUF)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def requests(path: Path) -> int:
    """Reads that a disk has had; 0 for a file."""
    if not path.is_block_device():
        return 0
    return int(Path(f"/sys/block/{path.name}/stat").read_text().split()[0])


def served() -> int:
    """Reads that our block server has answered since it started."""
    devices = rpc.call(SERVER, "status")["devices"].values()
    return sum(device["hits"] + device["misses"] for device in devices)


if __name__ == "__main__":
    main(int(sys.argv[1]))
