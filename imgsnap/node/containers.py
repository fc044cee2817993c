"""From a running container to the snapshot beneath it, by what the kernel has mounted.

containerd's shims mount a container's root on `<state>/…/<namespace>/<container id>/rootfs`;
ctr, nerdctl and crictl know the same id. No runtime is asked.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from imgsnap.errors import InvalidArgument
from imgsnap.mount.linux import MountPoint, mount_points
from imgsnap.mount.records import MountRecord, MountRecords

ROOTFS = "rootfs"
ID_PREFIX_MIN = 6
"""Characters of a container's id that may stand for it."""
_SEPARATOR = re.compile(r"(?<!\\):")


def snapshot_mount_of(records: MountRecords, name: str) -> MountRecord | None:
    """The mounted snapshot beneath a container, named by its id or the directory of its root.

    None when there is no such container, or no snapshot of ours beneath it. Raises InvalidArgument
    for the beginning of several ids.
    """
    found = {point.target.parent.name: point for point in mount_points() if _is_named(point, name)}
    exact = found.get(name)
    if exact is None and len(found) > 1:
        raise InvalidArgument(
            f"{name} is the beginning of {len(found)} containers' ids", hint="give more of it"
        )
    point = exact or next(iter(found.values()), None)
    if point is None:
        return None
    for lower in _lowers(point):
        record = records.get(records.id_of(Path(os.path.realpath(lower))))
        if record is not None:
            return record
    return None


def _is_named(point: MountPoint, name: str) -> bool:
    if str(point.target) == os.path.realpath(name):
        return True
    owner = point.target.parent.name
    if point.target.name != ROOTFS or "/" in name:
        return False
    return owner == name or (len(name) >= ID_PREFIX_MIN and owner.startswith(name))


def _lowers(point: MountPoint) -> Iterator[str]:
    """An overlay's lower directories, from the top down."""
    for option in point.options.split(","):
        if option.startswith("lowerdir="):
            for lower in _SEPARATOR.split(option.removeprefix("lowerdir=")):
                yield lower.replace("\\:", ":")
        elif option.startswith("lowerdir+="):
            yield option.removeprefix("lowerdir+=")
