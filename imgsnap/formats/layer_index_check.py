"""What holds for every layer index, checked on the decoded value before anyone relies on it.

The loops over all rows are C loops (`max`, `map`, set operations) where a rule allows it; rules
that tie columns together take one Python pass.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice, pairwise
from operator import lt

from imgsnap.errors import FormatError
from imgsnap.formats.layer_index import DirectoryRecord, Kind, LayerIndex
from imgsnap.formats.layer_index_layout import RECORD, Layout
from imgsnap.units import blocks_for

NAME_MAX = 255  # bytes of one name; linux/limits.h
PATH_MAX = 4096  # bytes of a path
TARGET_MAX = 4095  # bytes of a symlink's target: PATH_MAX less its NUL
XATTR_NAME_MAX = 255  # bytes of a full xattr name; linux/limits.h
XATTR_VALUE_MAX = 65536  # bytes; linux/limits.h XATTR_SIZE_MAX
NSEC_MAX = 10**9 - 1
MODE_MAX = 0o7777
FILE_SIZE_MAX = (1 << 63) - 1  # bytes; off_t

_NO_NAMES = frozenset((b"", b".", b".."))


def check_index(index: LayerIndex, layout: Layout) -> None:
    """Raises FormatError, with the offset by `layout`, at the first broken rule."""
    _check_files(index, layout)
    _check_strings(index, layout)
    _check_xattr_sets(index, layout)
    _check_inode_ranges(index, layout)
    _check_inodes(index, layout)
    _DirectoryCheck(index, layout).run()


def _bad(layout: Layout, section: str, row: int, problem: str) -> FormatError:
    return FormatError(RECORD, f"{section}[{row}]", layout.item(section, row), problem)


def _check_files(index: LayerIndex, layout: Layout) -> None:
    """Files follow each other in the extent without gaps: extent rule 1."""
    next_block = 0
    for row, (size, block) in enumerate(zip(index.files.size, index.files.block, strict=True)):
        if not 0 < size <= FILE_SIZE_MAX:
            raise _bad(layout, "file.size", row, f"{size} is no size of a stored file")
        if block != next_block:
            raise _bad(layout, "file.block", row, f"{block}, the file before ends at {next_block}")
        next_block = block + blocks_for(size)
    if next_block != index.extent_blocks:
        problem = f"{index.extent_blocks}, the files end at {next_block}"
        raise FormatError(RECORD, "extent_blocks", 84, problem)


def _check_strings(index: LayerIndex, layout: Layout) -> None:
    for row, target in enumerate(index.targets):
        if not 0 < len(target) <= TARGET_MAX or b"\0" in target:
            raise _bad(layout, "target.end", row, f"{target[:100]!r} is no symlink target")
    for row, path in enumerate(index.lower_links):
        if not path or not _is_path(path):
            raise _bad(layout, "lower_link.end", row, f"{path[:100]!r} is no path")


def _is_path(path: bytes) -> bool:
    names = path.split(b"/")
    return (
        len(path) <= PATH_MAX
        and b"\0" not in path
        and _NO_NAMES.isdisjoint(names)
        and max(map(len, names)) <= NAME_MAX
    )


def _check_xattr_sets(index: LayerIndex, layout: Layout) -> None:
    if not index.xattr_sets or index.xattr_sets[0]:
        raise _bad(layout, "xattr_set.end", 0, "the first set is not the empty one")
    row = 0
    for number, xattrs in enumerate(index.xattr_sets):
        names = [name for name, _ in xattrs]
        if number and not xattrs:
            raise _bad(layout, "xattr_set.end", number, "only the first set may be empty")
        if not _ascending(names):
            raise _bad(layout, "xattr_set.end", number, "its names are not sorted, or not unique")
        for name, value in xattrs:
            if not 0 < len(name) <= XATTR_NAME_MAX or b"\0" in name:
                raise _bad(layout, "xattr.name_end", row, f"{name[:100]!r} is no xattr name")
            if len(value) > XATTR_VALUE_MAX:
                raise _bad(layout, "xattr.value_end", row, f"{len(value)} bytes")
            row += 1


def _ascending(items: list[bytes]) -> bool:
    return all(map(lt, items, islice(items, 1, None)))


def _check_inode_ranges(index: LayerIndex, layout: Layout) -> None:
    columns = index.inodes
    for name, column, low, high in (
        ("kind", columns.kind, min(Kind), max(Kind)),
        ("mode", columns.mode, 0, MODE_MAX),
        ("nsec", columns.nsec, 0, NSEC_MAX),
        ("file", columns.file, 0, len(index.files)),
        ("xattrs", columns.xattrs, 0, len(index.xattr_sets) - 1),
    ):
        if column and not (low <= min(column) and max(column) <= high):
            row = _first_outside(column, low, high)
            raise _bad(layout, f"inode.{name}", row, f"{column[row]} is not in {low}..{high}")


def _first_outside(column: array[int], low: int, high: int) -> int:
    return next(row for row, value in enumerate(column) if not low <= value <= high)


def _check_inodes(index: LayerIndex, layout: Layout) -> None:
    """Columns that only some kinds use are zero for the others."""
    columns = index.inodes
    file_sizes = [0, *index.files.size]
    targets = len(index.targets)
    rows = zip(columns.kind, columns.size, columns.file, columns.target, columns.rdev, strict=True)
    for row, (kind, size, file, target, rdev) in enumerate(rows):
        if kind == Kind.FILE:
            if size != file_sizes[file]:
                problem = f"{size}, its content has {file_sizes[file]}"
                raise _bad(layout, "inode.size", row, problem)
        elif size or file:
            raise _bad(layout, "inode.size", row, "content in what is no regular file")
        if kind == Kind.SYMLINK:
            if target >= targets:
                raise _bad(layout, "inode.target", row, f"{target} is not below {targets}")
        elif target:
            raise _bad(layout, "inode.target", row, "a target in what is no symlink")
        if rdev and kind not in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
            raise _bad(layout, "inode.rdev", row, "a device number in what is no device")


class _DirectoryCheck:
    """The rules of DirectoryRecord, over all records in order."""

    def __init__(self, index: LayerIndex, layout: Layout) -> None:
        self._index = index
        self._layout = layout
        self._kinds = index.inodes.kind
        self._children: dict[bytes, set[bytes]] = {}  # names of child directories by path
        self._inodes: set[int] = set()  # rows that directories have taken

    def run(self) -> None:
        last: bytes | None = None
        for number, record in enumerate(self._index.directories):
            if last is None and record.path:
                raise self._bad_record(number, "the root has no record")
            if last is not None and record.path <= last:
                raise self._bad_record(number, "paths are not sorted, or not unique")
            last = record.path
            self._check_place(number, record)
        names = whiteouts = 0
        for record in self._index.directories:
            self._check_names(record, names)
            self._check_whiteouts(record, whiteouts)
            names += len(record.names)
            whiteouts += len(record.whiteouts)

    def _bad_record(self, number: int, problem: str) -> FormatError:
        path = self._index.directories[number].path
        problem = f"{path[:100]!r}: {problem}"
        return _bad(self._layout, "directory.path_end", number, problem)

    def _check_place(self, number: int, record: DirectoryRecord) -> None:
        """The path is one, its parent has a record, and the inode is a directory's own."""
        if record.path:
            # The parent's path has been checked, so checking the last name is enough.
            parent, _, name = record.path.rpartition(b"/")
            siblings = self._children.get(parent)
            if siblings is None:
                raise self._bad_record(number, "its parent has no record")
            if not _is_path(name) or len(record.path) > PATH_MAX:
                raise self._bad_record(number, "is no path")
            siblings.add(name)
        self._children[record.path] = set()
        if record.inode == -1:
            return
        if not 0 <= record.inode < len(self._kinds):
            raise self._bad_record(number, f"there is no inode {record.inode}")
        if self._kinds[record.inode] != Kind.DIRECTORY or record.inode in self._inodes:
            raise self._bad_record(number, f"inode {record.inode} is not its own directory")
        self._inodes.add(record.inode)

    def _check_names(self, record: DirectoryRecord, first: int) -> None:
        names = record.names
        if len(names) != len(record.inodes):
            raise _bad(self._layout, "name.inode", first, "names and inodes are not parallel")
        if not _are_names(names) or not self._children[record.path].isdisjoint(names):
            children = self._children[record.path]
            row = next(
                (row for row, name in enumerate(names) if not _is_name(name) or name in children),
                _first_unsorted(names),
            )
            problem = f"{names[row][:100]!r} is no name, not in order or also a directory"
            raise _bad(self._layout, "name.end", first + row, problem)
        for row in self._bad_inodes(record.inodes):
            problem = f"{record.inodes[row]} is no inode of a non-directory, and no lower link"
            raise _bad(self._layout, "name.inode", first + row, problem)

    def _bad_inodes(self, inodes: list[int]) -> Iterator[int]:
        kinds = self._kinds
        count, links = len(kinds), -len(self._index.lower_links)
        for row, inode in enumerate(inodes):
            if inode >= count or inode < links or (inode >= 0 and kinds[inode] == Kind.DIRECTORY):
                yield row

    def _check_whiteouts(self, record: DirectoryRecord, first: int) -> None:
        names = record.whiteouts
        if not _are_names(names):
            rows = (row for row, name in enumerate(names) if not _is_name(name))
            row = next(rows, _first_unsorted(names))
            problem = f"{names[row][:100]!r} is no name, or not in order"
            raise _bad(self._layout, "whiteout.end", first + row, problem)


def _is_name(name: bytes) -> bool:
    return b"/" not in name and _is_path(name)


def _are_names(names: list[bytes]) -> bool:
    """True for valid names in ascending order; an empty list is fine."""
    if not names:
        return True
    joined = b"/".join(names)
    return (
        joined.count(b"/") == len(names) - 1
        and b"\0" not in joined
        and _NO_NAMES.isdisjoint(names)
        and max(map(len, names)) <= NAME_MAX
        and _ascending(names)
    )


def _first_unsorted(names: list[bytes]) -> int:
    pairs = pairwise(names)
    return next((row for row, (name, after) in enumerate(pairs, 1) if name >= after), 0)
