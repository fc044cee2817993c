"""What overlayfs would show of a stack of layer directories, without mounting it.

The directories hold layers in overlay form: a character device 0/0 hides a name, the xattr
``trusted.overlay.opaque`` all that lower layers have in a directory (kernel,
Documentation/filesystems/overlayfs.rst). They do not change while they are looked at. Nothing in
them is trusted: no symlink is followed but inside the stack.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import IntegrityError

OPAQUE = "trusted.overlay.opaque"
SYMLINKS_MAX = 40
"""As the kernel's MAXSYMLINKS."""


@dataclass(frozen=True, slots=True)
class LowerEntry:
    """What a path holds."""

    places: tuple[bytes, ...]  # full paths, the uppermost first; several for a merged directory
    status: os.stat_result  # of the uppermost

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


class LowerView:
    """A stack of layers, the uppermost first; it may be empty."""

    def __init__(self, lowers: Sequence[Path]) -> None:
        places = tuple(os.fsencode(path.absolute()) for path in lowers)
        self._root = LowerEntry(places, os.lstat(places[0])) if places else None

    def find(self, path: bytes) -> LowerEntry | None:
        """What is at `path`; None for nothing, and below anything that is no directory."""
        found = self._root
        for name in path.split(b"/") if path else ():
            if found is None or not found.is_directory:
                return None
            found = _step(found, name)
        return found

    def find_through_links(self, path: bytes) -> LowerEntry | None:
        """As `find`, with symlinks among the parents followed inside the stack.

        Raises IntegrityError for a circle.
        """
        if self._root is None:
            return None
        trail = [self._root]
        todo = path.split(b"/")[::-1]
        for _ in range(SYMLINKS_MAX):
            link = self._walk(trail, todo)
            if link is None:
                return trail[-1] if not todo else None
            if link[:1] == b"/":
                del trail[1:]
            todo += link.split(b"/")[::-1]
        raise IntegrityError(f"{path[:200]!r}: more than {SYMLINKS_MAX} symlinks")

    def names(self, path: bytes) -> set[bytes]:
        """The names that the directory at `path` shows."""
        directory = self.find(path)
        if directory is None or not directory.is_directory:
            return set()
        listed: set[bytes] = set()
        for place in directory.places:
            with os.scandir(place) as found:
                listed.update(entry.name for entry in found)
        return {name for name in listed if _step(directory, name) is not None}

    @staticmethod
    def _walk(trail: list[LowerEntry], todo: list[bytes]) -> bytes | None:
        """Goes on until a symlink among the parents, whose target it returns, or to the end; what
        is left in `todo` then does not exist."""
        while todo:
            name = todo[-1]
            if name in (b"", b"."):
                todo.pop()
                continue
            if name == b"..":
                del trail[max(1, len(trail) - 1) :]
                todo.pop()
                continue
            found = _step(trail[-1], name) if trail[-1].is_directory else None
            if found is None:
                return None
            todo.pop()
            if todo and stat.S_ISLNK(found.status.st_mode):
                return os.readlink(found.places[0])  # noqa: PTH115  names are bytes
            trail.append(found)
        return None


def _step(directory: LowerEntry, name: bytes) -> LowerEntry | None:
    """The child `name` of a directory."""
    places: list[bytes] = []
    top: os.stat_result | None = None
    for parent in directory.places:
        place = parent + b"/" + name
        try:
            status = os.lstat(place)
        except FileNotFoundError:
            continue
        is_directory = stat.S_ISDIR(status.st_mode)
        if _is_whiteout(status) or (places and not is_directory):
            break
        places.append(place)
        top = top or status
        if not is_directory or _is_opaque(place):
            break
    return LowerEntry(tuple(places), top) if top is not None else None


def _is_whiteout(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(place: bytes) -> bool:
    try:
        return os.getxattr(place, OPAQUE, follow_symlinks=False) == b"y"
    except OSError:  # no such attribute, or a file system without attributes
        return False
