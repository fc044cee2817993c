"""A mount's tree on its target: EROFS, and the overlay over it when it is writable."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from imgsnap.mount.attach import ErofsMount
from imgsnap.mount.overlay import WritableLayer, mount_overlay
from imgsnap.mount.records import MountRecord


def show_tree(record: MountRecord, mount_erofs: Callable[[Path, Path], ErofsMount]) -> MountRecord:
    """Mounts the record's device, by `mount_erofs(device, directory)`, for its target."""
    target = Path(record.target)
    erofs_target = target
    if record.read_write:
        record.lower_dir.mkdir(mode=0o700)
        erofs_target = record.lower_dir
    erofs = mount_erofs(Path(record.device), erofs_target)
    if record.read_write:
        layer = WritableLayer(Path(record.rw_dir))
        layer.create()
        mount_overlay(record.overlay_source, erofs_target, layer, target)
    return replace(record, loop=erofs.loop)
