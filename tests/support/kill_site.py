"""A mounted snapshot over a slow repository, ready for a `KillRun`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imgsnap.mount.process import ProcessId
from imgsnap.node.devices import DEVICE_ALIGNMENT
from imgsnap.node.request import AttachRequest
from imgsnap.node.session import mount_snapshot, unmount
from imgsnap.node.source import Source
from imgsnap.node.targets import MountOptions
from imgsnap.units import align_up
from tests.support.kills import KillRun
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, erofs_image, make_tree


@contextmanager
def kill_site(
    root: Path, *, size_mib: int, latency_ms: float = 5
) -> Iterator[tuple[KillRun, ProcessId]]:
    tree = make_tree(root / "source", seed=7)
    with (tree / "large.bin").open("wb") as file:
        for number in range(size_mib):
            block = number.to_bytes(4, "little") + b"imgsnap" * 3
            file.write((block * (1 << 20))[: 1 << 20])
    built = build_snapshot(erofs_image(tree, root / "x.erofs"), extents=3)
    repository = MemoryRepository(built)
    repository.faults.latency_ms = latency_ms
    target = root / "mnt"
    request = AttachRequest(Source("store:unused", Path("/nonexistent")), "latest")
    options = MountOptions(request, target, root / "run", root / "cache")
    record = mount_snapshot(options, lambda source: repository)
    try:
        padded = built.device.ljust(align_up(len(built.device), DEVICE_ALIGNMENT), b"\0")
        run = KillRun(Path(record.device), padded, (tree, target), record.server_dir / "block.sock")
        yield run, record.server
    finally:
        unmount(target, root / "run")
