"""The layer index: everything a layer adds to or takes from the tree, without its file bytes.

A pure function of the layer's uncompressed tar (its diffID) and of the rules; it holds no pack
offsets. Columns are arrays, so that 50 000 entries cost a few MiB and decode without a loop.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import IntEnum

from imgsnap.digest import Digest
from imgsnap.formats.rules import Rules


class Kind(IntEnum):
    """Inode kinds; the values are stored in the layer index."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    CHAR_DEVICE = 4
    BLOCK_DEVICE = 5
    FIFO = 6


XattrSet = tuple[tuple[bytes, bytes], ...]
"""(name, value) pairs sorted by name; names are full (``user.x``, ``security.capability``)."""


@dataclass(slots=True)
class InodeColumns:
    """One row per inode of the layer. All columns have the same length."""

    kind: array[int] = field(default_factory=lambda: array("B"))
    mode: array[int] = field(default_factory=lambda: array("H"))  # permission bits, 0o7777
    uid: array[int] = field(default_factory=lambda: array("I"))
    gid: array[int] = field(default_factory=lambda: array("I"))
    mtime: array[int] = field(default_factory=lambda: array("q"))  # seconds, may be negative
    nsec: array[int] = field(default_factory=lambda: array("I"))  # 0 <= nsec < 10**9
    size: array[int] = field(default_factory=lambda: array("Q"))  # bytes; files only, else 0
    file: array[int] = field(default_factory=lambda: array("I"))  # row + 1 in FileColumns; 0: none
    rdev: array[int] = field(default_factory=lambda: array("I"))  # EROFS new_encode_dev; devices
    xattrs: array[int] = field(default_factory=lambda: array("I"))  # index into xattr_sets; 0: none
    target: array[int] = field(default_factory=lambda: array("I"))  # index into targets; symlinks

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(slots=True)
class FileColumns:
    """Unique non-empty regular files in extent order: sorted by path bytes, first path wins."""

    digest: bytearray = field(default_factory=bytearray)  # 32 bytes each, BLAKE3 of the content
    size: array[int] = field(default_factory=lambda: array("Q"))  # bytes, > 0
    block: array[int] = field(default_factory=lambda: array("I"))  # first block in the extent

    def __len__(self) -> int:
        return len(self.size)


@dataclass(slots=True)
class DirectoryRecord:
    """What a layer says of one directory.

    Every directory that has an entry of its own, that has entries below it, or that holds
    whiteouts has exactly one record; so the parents of a record all have records too. Child
    directories are implied by their own records and are not in `names`.
    """

    path: bytes  # no leading or trailing slash; b"" is the root
    inode: int = -1  # row in InodeColumns, or -1: implicit (no entry of its own in this layer)
    opaque: bool = False  # hides everything that lower layers have in it
    whiteouts: list[bytes] = field(default_factory=list)  # names hidden from lower layers, sorted
    names: list[bytes] = field(default_factory=list)  # non-directory children, sorted
    inodes: list[int] = field(default_factory=list)
    """Parallel to `names`: a row in InodeColumns, or -(k + 1) for a hard link to the path
    `LayerIndex.lower_links[k]` of a lower layer."""


@dataclass(slots=True)
class LayerIndex:
    """One layer, decoded. `directories` is sorted by path bytes."""

    diff_id: Digest
    rules: Rules
    inodes: InodeColumns = field(default_factory=InodeColumns)
    files: FileColumns = field(default_factory=FileColumns)
    directories: list[DirectoryRecord] = field(default_factory=list)
    xattr_sets: list[XattrSet] = field(default_factory=lambda: [()])
    targets: list[bytes] = field(default_factory=list)
    lower_links: list[bytes] = field(default_factory=list)
    extent_blocks: int = 0  # length of the layer's extent, in blocks
