"""EROFS on-disk records: the subset that imgsnap writes and reads.

Source of every layout and number here: Linux, fs/erofs/erofs_fs.h. All integers are
little-endian. An inode is named by its nid: its byte offset from the start of the metadata
area (block 0 here) in units of 32 bytes. docs/format/erofs.md has the same tables for people.
"""

import stat
import struct
from typing import NamedTuple

from imgsnap.errors import FormatError, UnsupportedFormat
from imgsnap.formats.crc32c import crc32c_raw
from imgsnap.formats.layer_index import Kind
from imgsnap.units import BLOCK_BITS, BLOCK_SIZE

SUPER_OFFSET = 1024  # bytes from the start of the device
SUPER_MAGIC = 0xE0F5E1E2
COMPAT_SB_CHKSUM = 0x1  # the checksum field holds a CRC-32C
COMPAT_MTIME = 0x2  # i_mtime of extended inodes is the modification time, not the change time

SLOT_BITS = 5  # a nid counts 32-byte slots
ROOT_NID_MAX = 0xFFFF

LAYOUT_COMPACT = 0
LAYOUT_EXTENDED = 1
FLAT_PLAIN = 0  # data in whole blocks from raw_blkaddr
FLAT_INLINE = 2  # the same, but the last partial block follows the inode and its xattrs
FORMAT_MASK = 0xF  # bit 0: inode version; bits 1-3: data layout; the rest must be zero

NAME_MAX = 255
SYMLINK_MAX = 4095  # PATH_MAX less its NUL

XATTR_USER = 1
XATTR_ACL_ACCESS = 2
XATTR_ACL_DEFAULT = 3
XATTR_TRUSTED = 4
XATTR_SECURITY = 6

KIND_MODE = (
    0,
    stat.S_IFREG,
    stat.S_IFDIR,
    stat.S_IFLNK,
    stat.S_IFCHR,
    stat.S_IFBLK,
    stat.S_IFIFO,
)
"""File type bits of i_mode by Kind."""

MODE_KIND = {bits: Kind(kind) for kind, bits in enumerate(KIND_MODE) if kind}

KIND_FILE_TYPE = (0, 1, 2, 7, 3, 4, 5)
"""dirent.file_type by Kind: the kernel's FT_REG_FILE and so on (include/linux/fs_types.h)."""

FILE_TYPE_KIND = {number: Kind(kind) for kind, number in enumerate(KIND_FILE_TYPE) if kind}


class Superblock(NamedTuple):
    """struct erofs_super_block, 128 bytes at SUPER_OFFSET.

    ======  ====  =====  ===================  ==============================================
    offset  size  type   name                 meaning
    ======  ====  =====  ===================  ==============================================
    0       4     u32    magic                0xE0F5E1E2
    4       4     u32    checksum             CRC-32C from here to the end of block 0
    8       4     u32    compat               feature bits a reader may ignore
    12      1     u8     block_bits           12
    13      1     u8     ext_slots            superblock is 128 + 16 * ext_slots bytes; 0
    14      2     u16    root_nid
    16      8     u64    inodes               number of inodes
    24      8     i64    build_time           0, for equal bytes from equal trees
    32      4     u32    build_time_nsec      0
    36      4     u32    blocks               length of the device in blocks, for statfs
    40      4     u32    meta_block           start of the metadata area: 0
    44      4     u32    xattr_block          shared xattrs: not used, 0
    48      16    bytes  uuid                 from the content
    64      16    bytes  volume_name          zeros
    80      4     u32    incompat             0: nothing beyond Linux 5.4
    84      2     u16    compressions         0
    86      2     u16    extra_devices        0
    88      2     u16    device_slot          0
    90      1     u8     dir_block_bits       0
    91      1     u8     xattr_prefixes       0
    92      4     u32    xattr_prefix_start   0
    96      8     u64    packed_nid           0
    104     1     u8     xattr_filter         0
    105     23           (reserved)           0
    ======  ====  =====  ===================  ==============================================
    """

    magic: int = SUPER_MAGIC
    checksum: int = 0
    compat: int = 0
    block_bits: int = BLOCK_BITS
    ext_slots: int = 0
    root_nid: int = 0
    inodes: int = 0
    build_time: int = 0
    build_time_nsec: int = 0
    blocks: int = 0
    meta_block: int = 0
    xattr_block: int = 0
    uuid: bytes = bytes(16)
    volume_name: bytes = bytes(16)
    incompat: int = 0
    compressions: int = 0
    extra_devices: int = 0
    device_slot: int = 0
    dir_block_bits: int = 0
    xattr_prefixes: int = 0
    xattr_prefix_start: int = 0
    packed_nid: int = 0
    xattr_filter: int = 0


SUPERBLOCK = struct.Struct("<IIIBBHQqIIII16s16sIHHHBBIQB23x")
assert SUPERBLOCK.size == 128


class CompactInode(NamedTuple):
    """struct erofs_inode_compact, 32 bytes; read, never written (it has no mtime of its own).

    ======  ====  ====  ============  ====================================================
    offset  size  type  name          meaning
    ======  ====  ====  ============  ====================================================
    0       2     u16   format        version and data layout, see FORMAT_MASK
    2       2     u16   xattr_count   0, or 1 + (length of the xattr body - 12) / 4
    4       2     u16   mode
    6       2     u16   nlink
    8       4     u32   size          bytes
    12      4           (reserved)
    16      4     u32   data          raw_blkaddr, or the device number
    20      4     u32   ino           for 32-bit stat only
    24      2     u16   uid
    26      2     u16   gid
    28      4           (reserved)
    ======  ====  ====  ============  ====================================================
    """

    format: int
    xattr_count: int
    mode: int
    nlink: int
    size: int
    data: int
    ino: int
    uid: int
    gid: int


COMPACT_INODE = struct.Struct("<HHHHI4xIIHH4x")
assert COMPACT_INODE.size == 32


class ExtendedInode(NamedTuple):
    """struct erofs_inode_extended, 64 bytes.

    ======  ====  ====  ============  ====================================================
    offset  size  type  name          meaning
    ======  ====  ====  ============  ====================================================
    0       2     u16   format        version and data layout, see FORMAT_MASK
    2       2     u16   xattr_count   0, or 1 + (length of the xattr body - 12) / 4
    4       2     u16   mode
    6       2           (reserved)
    8       8     u64   size          bytes
    16      4     u32   data          raw_blkaddr, or the device number
    20      4     u32   ino           for 32-bit stat only
    24      4     u32   uid
    28      4     u32   gid
    32      8     i64   mtime         seconds
    40      4     u32   nsec          nanoseconds
    44      4     u32   nlink
    48      16          (reserved)
    ======  ====  ====  ============  ====================================================
    """

    format: int
    xattr_count: int
    mode: int
    size: int
    data: int
    ino: int
    uid: int
    gid: int
    mtime: int
    nsec: int
    nlink: int


EXTENDED_INODE = struct.Struct("<HHH2xQIIIIqII16x")
assert EXTENDED_INODE.size == 64


class Dirent(NamedTuple):
    """struct erofs_dirent, 12 bytes.

    A directory block is an array of these followed by the names, in bytewise order of the names
    including ``.`` and ``..``. The first name_offset also tells how many there are.

    ======  ====  ====  ============  ====================================================
    offset  size  type  name          meaning
    ======  ====  ====  ============  ====================================================
    0       8     u64   nid
    8       2     u16   name_offset   bytes from the start of the directory block
    10      1     u8    file_type     see KIND_FILE_TYPE
    11      1           (reserved)
    ======  ====  ====  ============  ====================================================
    """

    nid: int
    name_offset: int
    file_type: int


DIRENT = struct.Struct("<QHBx")
assert DIRENT.size == 12


class XattrHeader(NamedTuple):
    """struct erofs_xattr_ibody_header, 12 bytes, directly after the inode.

    ======  ====  ====  ============  ====================================================
    offset  size  type  name          meaning
    ======  ====  ====  ============  ====================================================
    0       4     u32   filter        0: no name filter (used with a compat bit only)
    4       1     u8    shared        number of shared xattr ids: 0
    5       7           (reserved)
    ======  ====  ====  ============  ====================================================
    """

    filter: int
    shared: int


XATTR_HEADER = struct.Struct("<IB7x")
assert XATTR_HEADER.size == 12


class XattrEntry(NamedTuple):
    """struct erofs_xattr_entry, 4 bytes; name and value follow, padded to 4 bytes.

    ======  ====  ====  ============  ====================================================
    offset  size  type  name          meaning
    ======  ====  ====  ============  ====================================================
    0       1     u8    name_size     bytes, without the prefix
    1       1     u8    prefix        XATTR_USER and so on
    2       2     u16   value_size    bytes
    ======  ====  ====  ============  ====================================================
    """

    name_size: int
    prefix: int
    value_size: int


XATTR_ENTRY = struct.Struct("<BBH")
assert XATTR_ENTRY.size == 4

XATTR_BODY_MAX = XATTR_HEADER.size + 4 * (0xFFFF - 1)
"""Bytes; the count in the inode is a u16."""


def superblock_checksum(block: bytes | bytearray | memoryview) -> int:
    """The checksum of block 0.

    The kernel and erofs-utils run crc32c from ~0, without the final inversion, over the bytes
    from the superblock to the end of the block, with the checksum field as zero.
    """
    head = bytearray(block[SUPER_OFFSET:BLOCK_SIZE])
    head[4:8] = bytes(4)
    return crc32c_raw(head)


def parse_superblock(block: bytes) -> Superblock:
    """The superblock in `block`, the first BLOCK_SIZE bytes of a device.

    Raises FormatError for damage, UnsupportedFormat for features that we do not know.
    """

    def bad(field: str, offset: int, problem: str) -> FormatError:
        return FormatError("EROFS superblock", field, SUPER_OFFSET + offset, problem)

    if len(block) != BLOCK_SIZE:
        raise bad("magic", 0, f"the device has only {len(block)} bytes")
    super_block = Superblock._make(SUPERBLOCK.unpack_from(block, SUPER_OFFSET))
    if super_block.magic != SUPER_MAGIC:
        raise bad("magic", 0, f"{super_block.magic:#x} is not EROFS")
    if super_block.incompat:
        raise UnsupportedFormat(
            f"EROFS incompatible features {super_block.incompat:#x} are not known",
            hint="use a newer imgsnap, or let the kernel mount it",
        )
    if super_block.block_bits != BLOCK_BITS:
        raise UnsupportedFormat(f"EROFS block size is 2^{super_block.block_bits}, not 4096")
    if super_block.compat & COMPAT_SB_CHKSUM:
        expected = superblock_checksum(block)
        if super_block.checksum != expected:
            raise bad("checksum", 4, f"is {super_block.checksum:#x}, expected {expected:#x}")
    if super_block.dir_block_bits:
        raise UnsupportedFormat("EROFS directory blocks larger than a block are not known")
    return super_block
