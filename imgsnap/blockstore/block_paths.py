"""From blocks of a device to the paths of the files that have them, through the EROFS tree."""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from imgsnap.errors import ImgsnapError
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.units import BLOCK_SIZE

PATHS_MAX = 4
"""Paths named per run of blocks; whether there are more is told."""

Run = tuple[int, int]
"""Blocks [first, end) of the device."""


@dataclass(slots=True)
class Found:
    """The paths below the root (no slash in front) whose data is in a run, in the tree's order."""

    paths: list[bytes] = field(default_factory=list)
    more: bool = False


class MetadataBlocks:
    """The metadata region alone as the device that it begins: all that a walk reads of ours."""

    def __init__(self, file: BinaryIO, metadata_size: int, size: int) -> None:
        """Sizes in bytes: of the region, and of the whole device."""
        self.size = size
        self._file = file
        self._metadata_size = metadata_size

    def read(self, offset: int, length: int) -> bytes:
        """Raises ImgsnapError for what is not in the metadata."""
        if offset + length > self._metadata_size:
            raise ImgsnapError(f"bytes {offset}+{length} of the device are not metadata")
        self._file.seek(offset)
        return self._file.read(length)


def block_paths(tree: ErofsReader, runs: Iterable[Run]) -> Mapping[Run, Found]:
    """Who has these runs of blocks; a run that no file has is found with no path.

    Hard links are several paths. One walk of the tree for all runs; memory is that of the runs,
    and no image makes it compare more than PATHS_MAX files with each run: a run that has its
    paths is compared no more. Raises FormatError for a damaged tree.
    """
    found = {run: Found() for run in runs}
    waiting = sorted(found)
    longest = max((end - first for first, end in waiting), default=0)
    for path, inode in tree.walk():
        if not waiting:
            break
        whole = inode.size // BLOCK_SIZE if inode.inline >= 0 else -(-inode.size // BLOCK_SIZE)
        if not whole:
            continue
        low, high = inode.block, inode.block + whole
        start = bisect_left(waiting, (low - longest, 0))
        stop = bisect_left(waiting, (high, 0))
        full = False
        for run in waiting[start:stop]:
            if run[1] > low:
                full |= _take(found[run], path)
        if full:
            waiting[start:stop] = [run for run in waiting[start:stop] if not found[run].more]
    return found


def _take(found: Found, path: bytes) -> bool:
    """Adds a path; True when the run needs no more."""
    if len(found.paths) < PATHS_MAX:
        found.paths.append(path)
    else:
        found.more = True
    return found.more
