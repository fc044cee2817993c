"""Layout of the layer index record (docs/format/layer-index.md): header, columns, limits.

A fixed header, then the columns of SECTIONS one after the other, each padded with zeros to 8
bytes. The length of every section follows from the header's counts, so the whole record is
measured before anything is allocated for it.
"""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.digest import DIGEST_BYTES
from imgsnap.errors import FormatError
from imgsnap.formats.crc32c import crc32c
from imgsnap.formats.features import check_features, check_version
from imgsnap.units import MIB, align_up

RECORD = "layer index"
MAGIC = b"IMGSNPLI"
VERSION = 1

INODES_MAX = 4 << 20
"""Four times the converter's own limit of entries in one layer; the columns take 55 bytes each."""
NAMES_MAX = 4 << 20
"""Names of non-directories; hard links make them more than the inodes."""
DIRECTORIES_MAX = 4 << 20
WHITEOUTS_MAX = 4 << 20
XATTRS_MAX = 4 << 20
"""Pairs in all sets together; the number of sets has the same limit."""
BLOB_MAX = 512 * MIB
"""Bytes of one kind of string, all together: 128 a name."""
LAYER_INDEX_SIZE_MAX = 1024 * MIB
"""Bytes of the record. Whoever decompresses one must not go beyond it."""

_ALIGNMENT = 8


class Header(NamedTuple):
    """160 bytes at the start of the record.

    ======  ====  =====  ==================  ===============================================
    offset  size  type   name                meaning
    ======  ====  =====  ==================  ===============================================
    0       8     bytes  magic               IMGSNPLI
    8       4     u32    version             1
    12      4     u32    checksum            CRC-32C of the header, with this field zero
    16      4     u32    compat              feature bits that a reader may ignore
    20      4     u32    ro_compat           feature bits that forbid changing the record
    24      4     u32    incompat            feature bits that a reader must know
    28      32    bytes  diff_id             sha256 of the layer's uncompressed tar
    60      4     u32    rule_index          versions of the conversion rules
    64      4     u32    rule_extent
    68      4     u32    rule_chunk
    72      4     u32    chunk_target        bytes
    76      4     u32    chunk_min           bytes
    80      4     u32    chunk_max           bytes
    84      4     u32    extent_blocks       length of the extent in blocks
    88      4     u32    inodes              rows
    92      4     u32    files               rows
    96      4     u32    directories         rows
    100     4     u32    names               rows
    104     4     u32    whiteouts           rows
    108     4     u32    xattr_sets          rows; the first set is the empty one
    112     4     u32    xattrs              rows, of all sets
    116     4     u32    targets             rows
    120     4     u32    lower_links         rows
    124     4     u32    path_bytes          bytes of directory paths
    128     4     u32    name_bytes          bytes of names
    132     4     u32    whiteout_bytes      bytes of whiteout names
    136     4     u32    xattr_name_bytes    bytes of xattr names
    140     4     u32    xattr_value_bytes   bytes of xattr values
    144     4     u32    target_bytes        bytes of symlink targets
    148     4     u32    link_bytes          bytes of paths of lower links
    152     8            (reserved)          zeros
    ======  ====  =====  ==================  ===============================================
    """

    magic: bytes
    version: int
    checksum: int
    compat: int
    ro_compat: int
    incompat: int
    diff_id: bytes
    rule_index: int
    rule_extent: int
    rule_chunk: int
    chunk_target: int
    chunk_min: int
    chunk_max: int
    extent_blocks: int
    inodes: int
    files: int
    directories: int
    names: int
    whiteouts: int
    xattr_sets: int
    xattrs: int
    targets: int
    lower_links: int
    path_bytes: int
    name_bytes: int
    whiteout_bytes: int
    xattr_name_bytes: int
    xattr_value_bytes: int
    target_bytes: int
    link_bytes: int


HEADER = struct.Struct("<8s5I32s23I8x")
HEADER_SIZE = 160
assert HEADER.size == HEADER_SIZE

_CHECKSUM_AT = 12
_RESERVED_AT = 152
_COUNTS_AT = 88  # offset of Header.inodes; the counts are consecutive u32

COUNT_MAX = {
    "inodes": INODES_MAX,
    "files": INODES_MAX,
    "directories": DIRECTORIES_MAX,
    "names": NAMES_MAX,
    "whiteouts": WHITEOUTS_MAX,
    "xattr_sets": XATTRS_MAX,
    "xattrs": XATTRS_MAX,
    "targets": INODES_MAX,
    "lower_links": NAMES_MAX,
    "path_bytes": BLOB_MAX,
    "name_bytes": BLOB_MAX,
    "whiteout_bytes": BLOB_MAX,
    "xattr_name_bytes": BLOB_MAX,
    "xattr_value_bytes": BLOB_MAX,
    "target_bytes": BLOB_MAX,
    "link_bytes": BLOB_MAX,
}
"""The largest value of each count in the header, in the header's order."""


class Section(NamedTuple):
    """One column of the record."""

    name: str
    typecode: str  # of array.array; "s" for bytes
    width: int  # bytes of an item
    rows: str  # the header field that has the number of items


SECTIONS = (
    Section("inode.mtime", "q", 8, "inodes"),
    Section("inode.size", "Q", 8, "inodes"),
    Section("inode.uid", "I", 4, "inodes"),
    Section("inode.gid", "I", 4, "inodes"),
    Section("inode.nsec", "I", 4, "inodes"),
    Section("inode.file", "I", 4, "inodes"),
    Section("inode.rdev", "I", 4, "inodes"),
    Section("inode.xattrs", "I", 4, "inodes"),
    Section("inode.target", "I", 4, "inodes"),
    Section("inode.mode", "H", 2, "inodes"),
    Section("inode.kind", "B", 1, "inodes"),
    Section("file.digest", "s", DIGEST_BYTES, "files"),
    Section("file.size", "Q", 8, "files"),
    Section("file.block", "I", 4, "files"),
    Section("directory.inode", "i", 4, "directories"),
    Section("directory.path_end", "I", 4, "directories"),
    Section("directory.names_end", "I", 4, "directories"),
    Section("directory.whiteouts_end", "I", 4, "directories"),
    Section("directory.opaque", "B", 1, "directories"),
    Section("path.bytes", "s", 1, "path_bytes"),
    Section("name.inode", "i", 4, "names"),
    Section("name.end", "I", 4, "names"),
    Section("name.bytes", "s", 1, "name_bytes"),
    Section("whiteout.end", "I", 4, "whiteouts"),
    Section("whiteout.bytes", "s", 1, "whiteout_bytes"),
    Section("xattr_set.end", "I", 4, "xattr_sets"),
    Section("xattr.name_end", "I", 4, "xattrs"),
    Section("xattr.value_end", "I", 4, "xattrs"),
    Section("xattr.name_bytes", "s", 1, "xattr_name_bytes"),
    Section("xattr.value_bytes", "s", 1, "xattr_value_bytes"),
    Section("target.end", "I", 4, "targets"),
    Section("target.bytes", "s", 1, "target_bytes"),
    Section("lower_link.end", "I", 4, "lower_links"),
    Section("lower_link.bytes", "s", 1, "link_bytes"),
)
"""All columns in order. An `end` column has the exclusive end of each item in the column or the
bytes that it cuts up; an item starts where the one before it ends."""

WIDTHS = {section.name: section.width for section in SECTIONS}

assert all(s.typecode == "s" or array(s.typecode).itemsize == s.width for s in SECTIONS)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each section of one record is."""

    header: Header
    offsets: dict[str, int]  # bytes from the start of the record, by section name
    size: int  # bytes of the record

    @classmethod
    def of(cls, header: Header) -> Layout:
        """The layout that the header's counts ask for."""
        offsets = {}
        at = HEADER_SIZE
        for section in SECTIONS:
            offsets[section.name] = at
            length = section.width * getattr(header, section.rows)
            at = align_up(at + length, _ALIGNMENT)
        return cls(header, offsets, at)

    def item(self, name: str, row: int) -> int:
        """Offset of an item, for error messages."""
        return self.offsets[name] + row * WIDTHS[name]


def pack_header(header: Header) -> bytes:
    """The header's bytes, with the checksum filled in."""
    return HEADER.pack(*header._replace(checksum=header_checksum(HEADER.pack(*header))))


def header_checksum(data: bytes | memoryview) -> int:
    """CRC-32C of a header's bytes with the checksum field as zero."""
    blank = bytearray(data[:HEADER_SIZE])
    blank[_CHECKSUM_AT : _CHECKSUM_AT + 4] = bytes(4)
    return crc32c(blank)


def parse_header(data: bytes) -> Header:
    """The header of a record, with every count within its limit.

    Raises FormatError for damage, UnsupportedFormat for newer formats.
    """
    if len(data) < HEADER_SIZE:
        raise FormatError(RECORD, "header", 0, f"{len(data)} bytes, {HEADER_SIZE} needed")
    header = Header._make(HEADER.unpack_from(data))
    if header.magic != MAGIC:
        raise FormatError(RECORD, "magic", 0, f"{header.magic!r} is not {MAGIC!r}")
    check_version(RECORD, header.version, VERSION)
    expected = header_checksum(data)
    if header.checksum != expected:
        problem = f"is {header.checksum:#x}, expected {expected:#x}"
        raise FormatError(RECORD, "checksum", _CHECKSUM_AT, problem)
    check_features(RECORD, header.incompat)
    if any(data[_RESERVED_AT:HEADER_SIZE]):
        raise FormatError(RECORD, "reserved", _RESERVED_AT, "is not zero")
    for number, (count, maximum) in enumerate(COUNT_MAX.items()):
        value = getattr(header, count)
        if value > maximum:
            raise FormatError(RECORD, count, _COUNTS_AT + 4 * number, f"{value} is over {maximum}")
    return header
