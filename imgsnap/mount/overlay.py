"""A writable view: overlayfs with the snapshot below and a directory on disk above."""

import os
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.node_cache import remove_tree
from imgsnap.errors import Unsupported
from imgsnap.mount import linux
from imgsnap.mount.linux import MountFlag

_ESCAPED = str.maketrans({"\\": "\\\\", ",": "\\,", ":": "\\:"})


@dataclass(frozen=True, slots=True)
class WritableLayer:
    """The two directories that overlayfs wants on one file system, under one of our own."""

    root: Path

    @property
    def upper(self) -> Path:
        return self.root / "upper"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def create(self) -> None:
        """Makes the directories. Raises Unsupported where overlayfs cannot write (on overlayfs)."""
        try:
            self.root.mkdir(parents=True, mode=0o700)
            if linux.filesystem_magic(self.root) == linux.OVERLAYFS_MAGIC:
                self.root.rmdir()
                raise Unsupported(
                    f"{self.root} is on overlayfs, which cannot hold an overlay's changes",
                    hint="choose a directory on a disk or tmpfs, for example a container volume",
                )
            self.upper.mkdir(mode=0o755)
            self.work.mkdir(mode=0o700)
        except OSError as error:
            raise linux.mount_error(error) from error

    def remove(self) -> None:
        """Deletes the changes. The overlay must be unmounted."""
        remove_tree(self.root)


def mount_overlay(source: str, lower: Path, layer: WritableLayer, target: Path) -> None:
    """Mounts `layer` over `lower` at `target`; `source` is what mountinfo shows."""
    _copy_attributes(lower, layer.upper)
    options = (
        f"lowerdir={escape(lower)},upperdir={escape(layer.upper)},workdir={escape(layer.work)}"
    )
    try:
        linux.mount(source, target, "overlay", MountFlag.NODEV, options)
    except OSError as error:
        raise linux.mount_error(error) from error


def escape(path: Path) -> str:
    """A path as overlayfs wants it in its options: commas end an option, colons a layer."""
    return str(path).translate(_ESCAPED)


def _copy_attributes(lower: Path, upper: Path) -> None:
    """The overlay's root shows the upper directory's owner and mode: make them the image's."""
    found = lower.stat()
    os.chown(upper, found.st_uid, found.st_gid)
    upper.chmod(found.st_mode & 0o7777)
