"""Undoing a mount: used by the process that unmounts and by the server when it ends."""

from pathlib import Path

from imgsnap.blockstore.node_cache import remove_tree
from imgsnap.errors import Busy
from imgsnap.mount import attach, linux
from imgsnap.mount.linux import MountPoint
from imgsnap.mount.overlay import WritableLayer
from imgsnap.mount.records import MountRecord, MountRecords


def is_mounted(record: MountRecord) -> bool:
    """Whether anything of this mount is still there."""
    places = {record.lower_dir, record.device_dir}
    return any(
        point.target in places or _is_target(record, point) for point in linux.mount_points()
    )


def unmount_tree(record: MountRecord, *, lazy: bool) -> None:
    """Unmounts overlay, EROFS and FUSE; what is unmounted already is fine.

    Raises Busy while files are open, or when something else is mounted over the target.
    """
    target = Path(record.target)
    at_target = [point for point in linux.mount_points() if point.target == target]
    if any(_is_target(record, point) for point in at_target):
        if not _is_target(record, at_target[-1]):
            raise Busy(
                f"{target} is covered by another mount ({at_target[-1].source})",
                hint="unmount that one first",
            )
        attach.unmount(target, lazy=lazy)
    try:
        attach.unmount(record.lower_dir, lazy=lazy, retry=True)
        attach.unmount(record.device_dir, lazy=lazy, retry=True)
    except Busy as error:
        raise Busy(
            f"{target} is unmounted, but something still uses the snapshot below it",
            hint="a bind mount or another mount namespace (a container) may hold it; end that and "
            "unmount again, or unmount lazily",
        ) from error


def unmount_gently(record: MountRecord, *, lazy: bool) -> bool:
    """As `unmount_tree`; with `lazy` it detaches only what is in use. False when that was so: the
    overlay's directories are then still written to."""
    try:
        unmount_tree(record, lazy=False)
    except Busy:
        if not lazy:
            raise
        unmount_tree(record, lazy=True)
        return False
    return True


def remove_entry(records: MountRecords, record: MountRecord) -> None:
    """Frees the target: its directory, if we made it, and the record."""
    current = records.get(record.id)
    if current is None or current.instance != record.instance:
        return  # the target belongs to someone else by now
    if record.target_created:
        attach.remove_directory(Path(record.target))
    records.remove(record)


def remove_instance(record: MountRecord, *, keep_changes: bool = False) -> None:
    """Deletes what only this instance used: directories, the log, and the overlay's changes unless
    somebody still makes some."""
    attach.remove_directory(record.device_dir)
    attach.remove_directory(record.lower_dir)
    remove_tree(record.server_dir)
    if record.rw_dir and not keep_changes:
        WritableLayer(Path(record.rw_dir)).remove()
    remove_tree(record.log_path)


def _is_target(record: MountRecord, point: MountPoint) -> bool:
    ours = (record.overlay_source, record.device, record.loop)
    return str(point.target) == record.target and point.source in ours and bool(point.source)
