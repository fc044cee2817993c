"""Bytes of a layer index and back; layer_index_layout.py says what goes where.

A value has exactly one encoding, and what decodes is a value that encodes to the same bytes
(unknown compat bits aside). Both directions run the same checks, so a value that breaks the
rules is neither written nor read.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from operator import le

from imgsnap.digest import digest_from_raw, digest_to_raw
from imgsnap.errors import FormatError
from imgsnap.formats.layer_index import DirectoryRecord, FileColumns, InodeColumns, LayerIndex
from imgsnap.formats.layer_index_check import check_index
from imgsnap.formats.layer_index_layout import (
    COUNT_MAX,
    LAYER_INDEX_SIZE_MAX,
    MAGIC,
    RECORD,
    SECTIONS,
    VERSION,
    Header,
    Layout,
    Section,
    pack_header,
    parse_header,
)
from imgsnap.formats.rules import Rules

INODE_COLUMNS = (
    "kind",
    "mode",
    "uid",
    "gid",
    "mtime",
    "nsec",
    "size",
    "file",
    "rdev",
    "xattrs",
    "target",
)


def encode(index: LayerIndex) -> bytes:
    """The record's bytes; a pure function of the value.

    Raises FormatError for a value that breaks the format's rules.
    """
    columns = _columns(index)
    header = _header(index, columns)
    layout = Layout.of(header)
    _check_size(layout)
    check_index(index, layout)
    out = bytearray(layout.size)
    packed = pack_header(header)
    out[: len(packed)] = packed
    for section in SECTIONS:
        data = _column_bytes(columns[section.name], section)
        at = layout.offsets[section.name]
        out[at : at + len(data)] = data
    return bytes(out)


def decode(data: bytes) -> LayerIndex:
    """The value of a record.

    Raises FormatError for damage, UnsupportedFormat for a newer format or unknown rules.
    """
    header = parse_header(data)
    layout = Layout.of(header)
    _check_size(layout)
    if len(data) != layout.size:
        problem = f"the header asks for {layout.size} bytes"
        raise FormatError(RECORD, "length", len(data), problem)
    reader = _Reader(data, layout)
    reader.check_padding()
    index = LayerIndex(
        diff_id=digest_from_raw(header.diff_id),
        rules=_rules(header),
        inodes=InodeColumns(*(reader.numbers(f"inode.{name}") for name in INODE_COLUMNS)),
        files=FileColumns(
            bytearray(reader.raw("file.digest")),
            reader.numbers("file.size"),
            reader.numbers("file.block"),
        ),
        directories=_decode_directories(reader),
        xattr_sets=_decode_xattrs(reader),
        targets=reader.strings("target.end", "target.bytes"),
        lower_links=reader.strings("lower_link.end", "lower_link.bytes"),
        extent_blocks=header.extent_blocks,
    )
    check_index(index, layout)
    return index


def _rules(header: Header) -> Rules:
    return Rules(
        chunk_target=header.chunk_target,
        chunk_min=header.chunk_min,
        chunk_max=header.chunk_max,
        index=header.rule_index,
        extent=header.rule_extent,
        chunk=header.rule_chunk,
    )


def _check_size(layout: Layout) -> None:
    if layout.size > LAYER_INDEX_SIZE_MAX:
        problem = f"{layout.size} bytes are over {LAYER_INDEX_SIZE_MAX}"
        raise FormatError(RECORD, "length", 0, problem)


def _columns(index: LayerIndex) -> dict[str, bytes | array[int]]:
    directories = index.directories
    names = [name for record in directories for name in record.names]
    whiteouts = [name for record in directories for name in record.whiteouts]
    pairs = [pair for xattrs in index.xattr_sets for pair in xattrs]
    columns: dict[str, bytes | array[int]] = {
        f"inode.{name}": getattr(index.inodes, name) for name in INODE_COLUMNS
    }
    columns |= {
        "file.digest": bytes(index.files.digest),
        "file.size": index.files.size,
        "file.block": index.files.block,
        "directory.inode": array("i", (record.inode for record in directories)),
        "directory.names_end": _ends(record.names for record in directories),
        "directory.whiteouts_end": _ends(record.whiteouts for record in directories),
        "directory.opaque": array("B", (record.opaque for record in directories)),
        "name.inode": array("i", chain.from_iterable(record.inodes for record in directories)),
        "xattr_set.end": _ends(index.xattr_sets),
    }
    for end, blob, items in (
        ("directory.path_end", "path.bytes", [record.path for record in directories]),
        ("name.end", "name.bytes", names),
        ("whiteout.end", "whiteout.bytes", whiteouts),
        ("xattr.name_end", "xattr.name_bytes", [name for name, _ in pairs]),
        ("xattr.value_end", "xattr.value_bytes", [value for _, value in pairs]),
        ("target.end", "target.bytes", index.targets),
        ("lower_link.end", "lower_link.bytes", index.lower_links),
    ):
        columns[end] = _ends(items)
        columns[blob] = b"".join(items)
    return columns


def _ends(items: Iterable[Sequence[object]]) -> array[int]:
    return array("I", accumulate(map(len, items)))


def _header(index: LayerIndex, columns: dict[str, bytes | array[int]]) -> Header:
    rules = index.rules
    counts: dict[str, int] = {}
    for section in SECTIONS:
        length = len(columns[section.name])
        items = length // section.width if section.typecode == "s" else length
        if counts.setdefault(section.rows, items) != items:
            raise FormatError(RECORD, section.name, 0, f"{items} rows, not {counts[section.rows]}")
        if items > COUNT_MAX[section.rows]:
            problem = f"{items} is over {COUNT_MAX[section.rows]}"
            raise FormatError(RECORD, section.rows, 0, problem)
    return Header(
        magic=MAGIC,
        version=VERSION,
        checksum=0,
        compat=0,
        ro_compat=0,
        incompat=0,
        diff_id=digest_to_raw(index.diff_id),
        rule_index=rules.index,
        rule_extent=rules.extent,
        rule_chunk=rules.chunk,
        chunk_target=rules.chunk_target,
        chunk_min=rules.chunk_min,
        chunk_max=rules.chunk_max,
        extent_blocks=index.extent_blocks,
        **counts,
    )


def _column_bytes(column: bytes | array[int], section: Section) -> bytes:
    if isinstance(column, bytes):
        return column
    assert column.typecode == section.typecode, section.name
    return _little_endian(column).tobytes()


def _little_endian(column: array[int]) -> array[int]:
    """The column with its bytes in the record's order, or back."""
    if sys.byteorder == "little":
        return column
    swapped = column[:]
    swapped.byteswap()
    return swapped


class _Reader:
    """Sections of a record whose length is already known to be right."""

    def __init__(self, data: bytes, layout: Layout) -> None:
        self._data = data
        self.layout = layout
        self._sections = {section.name: section for section in SECTIONS}

    def _bounds(self, name: str) -> tuple[int, int]:
        section = self._sections[name]
        start = self.layout.offsets[name]
        return start, start + section.width * getattr(self.layout.header, section.rows)

    def check_padding(self) -> None:
        """Bytes between sections are zeros; otherwise one value would have many encodings."""
        starts = [*self.layout.offsets.values(), self.layout.size][1:]
        for section, next_start in zip(SECTIONS, starts, strict=True):
            _, end = self._bounds(section.name)
            if any(self._data[end:next_start]):
                raise FormatError(RECORD, f"padding of {section.name}", end, "is not zero")

    def raw(self, name: str) -> bytes:
        start, end = self._bounds(name)
        return self._data[start:end]

    def numbers(self, name: str) -> array[int]:
        column = array(self._sections[name].typecode)
        column.frombytes(self.raw(name))
        return _little_endian(column)

    def ends(self, name: str, total: int) -> tuple[list[int], list[int]]:
        """Start and end of each item of something with `total` parts; in order, and all of it."""
        column = self.numbers(name).tolist()
        starts = [0, *column]
        last = starts.pop()
        if last != total or not all(map(le, starts, column)):
            rows = enumerate(zip(starts, column, strict=True))
            row = next((row for row, (start, end) in rows if start > end), max(len(column) - 1, 0))
            problem = f"items do not cut {total} into consecutive parts"
            raise FormatError(RECORD, name, self.layout.item(name, row), problem)
        return starts, column

    def strings(self, end: str, blob: str) -> list[bytes]:
        data = self.raw(blob)
        starts, ends = self.ends(end, len(data))
        return [data[start:stop] for start, stop in zip(starts, ends, strict=True)]


def _decode_directories(reader: _Reader) -> list[DirectoryRecord]:
    header = reader.layout.header
    names = reader.strings("name.end", "name.bytes")
    inodes = reader.numbers("name.inode").tolist()
    whiteouts = reader.strings("whiteout.end", "whiteout.bytes")
    rows = zip(
        reader.strings("directory.path_end", "path.bytes"),
        reader.numbers("directory.inode"),
        _flags(reader, "directory.opaque"),
        *reader.ends("directory.names_end", header.names),
        *reader.ends("directory.whiteouts_end", header.whiteouts),
        strict=True,
    )
    return [
        DirectoryRecord(path, inode, opaque, whiteouts[wh_at:wh_end], names[at:end], inodes[at:end])
        for path, inode, opaque, at, end, wh_at, wh_end in rows
    ]


def _flags(reader: _Reader, name: str) -> list[bool]:
    column = reader.numbers(name)
    if column and max(column) > 1:
        row = next(row for row, value in enumerate(column) if value > 1)
        raise FormatError(RECORD, name, reader.layout.item(name, row), f"{column[row]}, not 0 or 1")
    return list(map(bool, column))


def _decode_xattrs(reader: _Reader) -> list[tuple[tuple[bytes, bytes], ...]]:
    names = reader.strings("xattr.name_end", "xattr.name_bytes")
    values = reader.strings("xattr.value_end", "xattr.value_bytes")
    pairs = list(zip(names, values, strict=True))
    starts, ends = reader.ends("xattr_set.end", len(pairs))
    return [tuple(pairs[start:end]) for start, end in zip(starts, ends, strict=True)]
