"""Mounting a complete snapshot from local files: extents as devices, or one flat file.

Needs root and a node cache that holds the snapshot whole (`imgsnap warm`). Times are medians; cold
means that nothing of the backing files is in the page cache. Prints JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.blockstore.direct import DirectDevice, open_direct
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import Snapshot, open_snapshot
from imgsnap.mount import attach, linux
from imgsnap.oci.layout import LayoutRepository
from imgsnap.units import BLOCK_SIZE, MIB


def flat_copy(snapshot: Snapshot, device: DirectDevice, path: Path) -> None:
    """What the alternative would make: one file, by copy_file_range."""
    extents = [extent for extent in snapshot.config.extents if extent.blocks]
    with path.open("wb") as file:
        file.truncate(snapshot.size)
        region = os.pread(snapshot.metadata.fileno(), snapshot.metadata_size, 0)
        os.pwrite(file.fileno(), region, 0)
        for extent, source in zip(extents, device.devices, strict=True):
            done, size = 0, extent.blocks * BLOCK_SIZE
            base = extent.base_block * BLOCK_SIZE
            while done < size:
                done += os.copy_file_range(source, file.fileno(), size - done, done, base + done)


@contextmanager
def mounted(mount: Callable[[Path], None], target: Path) -> Iterator[None]:
    mount(target)
    try:
        yield
    finally:
        attach.unmount(target, retry=True)


def read_tree(root: Path) -> int:
    total = 0
    buffer = bytearray(MIB)
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.is_symlink() or not path.is_file():
                continue
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total


def largest(root: Path) -> Path:
    files = (Path(d, name) for d, _, names in os.walk(root) for name in names)
    return max(
        (path for path in files if not path.is_symlink()), key=lambda path: path.lstat().st_size
    )


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def forget(paths: list[Path]) -> None:
    """Drops the page cache of files."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(
    mount: Callable[[Path], None], backing: list[Path], target: Path, runs: int
) -> dict[str, float]:
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for _ in range(runs):
        forget(backing)
        with mounted(mount, target):
            note("tree, cold", timed(lambda: read_tree(target)))
        note("mount", timed(lambda: mount(target)))
        note("tree, backing cached", timed(lambda: read_tree(target)))
        note("tree, again", timed(lambda: read_tree(target)))
        attach.unmount(target, retry=True)
        with mounted(mount, target):
            file = largest(target)
            seconds = timed(file.read_bytes)
            note("sequential MiB/s, backing cached", file.stat().st_size / MIB / seconds)
    return {name: round(statistics.median(values), 5) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    cache = NodeCache(options.cache)
    snapshot = open_snapshot(LayoutRepository(options.layout), options.reference, cache)
    result: dict[str, object] = {"device bytes": snapshot.size}
    for marker in cache.root.glob("extents/*/verified"):
        marker.unlink()
    first = timed(lambda: open_direct(snapshot, cache))
    with TemporaryDirectory(dir=options.cache) as directory:
        target, flat = Path(directory, "target"), Path(directory, "flat")
        target.mkdir()
        device = open_direct(snapshot, cache)
        if device is None:
            raise SystemExit("the snapshot is not whole in the cache")
        result["first open, every chunk hashed"] = round(first, 4)
        result["open again"] = round(timed(lambda: open_direct(snapshot, cache)), 5)
        result["flat copy"] = round(timed(lambda: flat_copy(snapshot, device, flat)), 4)
        result["flat copy, bytes on disk"] = flat.stat().st_blocks * 512
        result["device table, bytes on disk"] = device.metadata.stat().st_blocks * 512
        extents = [Path(f"/proc/self/fd/{fd}").readlink() for fd in device.devices]
        flags = linux.MountFlag.RDONLY | linux.MountFlag.NODEV
        ways: dict[str, tuple[Callable[[Path], None], list[Path]]] = {
            "extents as devices": (
                lambda place: linux.mount(
                    str(device.metadata), place, "erofs", flags, device.mount_options
                ),
                [device.metadata, *extents],
            ),
            "flat file": (lambda place: linux.mount(str(flat), place, "erofs", flags), [flat]),
        }
        for name, (mount, backing) in ways.items():
            result[name] = measure(mount, backing, target, options.runs)
        device.close()
    snapshot.close()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
