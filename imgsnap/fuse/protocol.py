"""The kernel's FUSE protocol, version 7.x: the records that a read-only server needs.

Source: include/uapi/linux/fuse.h (Linux 6.18). All records are in native byte order without
implicit padding; every size below is that of the C struct.
"""

import stat
import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

KERNEL_VERSION = 7
MINOR_MIN = 31
"""Linux 5.4, the oldest kernel with EROFS. Before 7.23 the reply to INIT had another size."""
MINOR_MAX = 45
"""The newest minor version whose changes have been looked at."""

ROOT_ID = 1
PAGE_SIZE = 4096
MAX_PAGES = 256
"""fs.fuse.max_pages_limit of an untuned kernel: 1 MiB requests."""
READ_SIZE_MAX = MAX_PAGES * PAGE_SIZE
MAX_WRITE = 4096
"""The least the kernel takes; nothing is ever written."""
REQUEST_SIZE_MAX = 16384
"""The kernel refuses buffers below FUSE_MIN_READ_BUFFER (8192) or max_write and a header."""
NAME_MAX = 255
UNIQUE_RESEND = 1 << 63
"""Set in `unique` of a request that is sent again after FUSE_NOTIFY_RESEND."""
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7


class Opcode(IntEnum):
    """enum fuse_opcode: those that reach a read-only file system."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


class InitFlag(IntFlag):
    """FUSE_INIT flags; those from bit 32 on travel in `flags2` and need INIT_EXT."""

    ASYNC_READ = 1 << 0
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    EXPLICIT_INVAL_DATA = 1 << 25
    INIT_EXT = 1 << 30
    HAS_RESEND = 1 << 39


WANTED_FLAGS = (
    InitFlag.ASYNC_READ
    | InitFlag.ASYNC_DIO
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
)
"""Never PASSTHROUGH: a superblock with it is refused below a file-backed EROFS mount."""


class OpenFlag(IntFlag):
    """FOPEN_*: what the kernel may do with an open file."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3


IN_HEADER = struct.Struct("=IIQQ16x")
"""struct fuse_in_header: 0 4 u32 length · 4 4 u32 opcode · 8 8 u64 unique · 16 8 u64 nodeid ·
24 4 uid · 28 4 gid · 32 4 pid · 36 2 total_extlen · 38 2 padding"""
IN_HEADER_SIZE = 40
assert IN_HEADER.size == IN_HEADER_SIZE

OUT_HEADER = struct.Struct("=IiQ")
"""struct fuse_out_header: 0 4 u32 length · 4 4 i32 -errno (or a notify code when unique is 0) ·
8 8 u64 unique"""
OUT_HEADER_SIZE = 16
assert OUT_HEADER.size == OUT_HEADER_SIZE

READ_IN = struct.Struct("=8xQI20x")
"""struct fuse_read_in: 0 8 fh · 8 8 u64 offset · 16 4 u32 size · 20 4 read_flags ·
24 8 lock_owner · 32 4 flags · 36 4 padding"""
assert READ_IN.size == 40

OPEN_OUT = struct.Struct("=QIi")
"""struct fuse_open_out: 0 8 u64 fh · 8 4 u32 open_flags · 12 4 i32 backing_id"""
assert OPEN_OUT.size == 16

DIRENT = struct.Struct("=QQII")
"""struct fuse_dirent: 0 8 ino · 8 8 next offset · 16 4 name length · 20 4 type (DT_*); the name
follows, padded to 8 bytes"""
assert DIRENT.size == 24

STATFS_OUT = struct.Struct("=QQQQQIII28x")
"""struct fuse_kstatfs: 0 8 blocks · 8 8 bfree · 16 8 bavail · 24 8 files · 32 8 ffree ·
40 4 bsize · 44 4 namelen · 48 4 frsize · 52 4 padding · 56 24 spare"""
assert STATFS_OUT.size == 80

ENTRY_OUT = struct.Struct("=QQQQII")
"""struct fuse_entry_out up to its attr: 0 8 nodeid · 8 8 generation · 16 8 entry_valid s ·
24 8 attr_valid s · 32 4 entry_valid ns · 36 4 attr_valid ns"""
assert ENTRY_OUT.size == 40

ATTR_OUT = struct.Struct("=QII")
"""struct fuse_attr_out up to its attr: 0 8 attr_valid s · 8 4 attr_valid ns · 12 4 dummy"""
assert ATTR_OUT.size == 16

ATTR = struct.Struct("=QQQ24x12xIIIIIII")
"""struct fuse_attr: 0 8 ino · 8 8 size · 16 8 blocks of 512 · 24 24 a/m/ctime · 48 12 their ns ·
60 4 mode · 64 4 nlink · 68 4 uid · 72 4 gid · 76 4 rdev · 80 4 blksize · 84 4 flags"""
assert ATTR.size == 88

VALID_S = 1 << 20
"""Names and attributes never change while a superblock lives: twelve days, then one request."""


class InitRequest(NamedTuple):
    """struct fuse_init_in: 0 4 major · 4 4 minor · 8 4 max_readahead · 12 4 flags · 16 4 flags2 ·
    20 44 unused"""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag

    @classmethod
    def parse(cls, body: memoryview) -> "InitRequest":
        major, minor, readahead, low = _INIT_IN.unpack_from(body)
        high = 0
        if low & InitFlag.INIT_EXT and len(body) >= 20:
            (high,) = struct.unpack_from("=I", body, 16)
        return cls(major, minor, readahead, InitFlag(low | high << 32))


_INIT_IN = struct.Struct("=IIII")

INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")
"""struct fuse_init_out: 0 4 major · 4 4 minor · 8 4 max_readahead · 12 4 flags ·
16 2 max_background · 18 2 congestion_threshold · 20 4 max_write · 24 4 time_gran ns ·
28 2 max_pages · 30 2 map_alignment · 32 4 flags2 · 36 4 max_stack_depth · 40 24 unused"""
assert INIT_OUT.size == 64


FORGET_ONE = struct.Struct("=QQ")
"""struct fuse_forget_one: 0 8 nodeid · 8 8 nlookup. BATCH_FORGET has 8 bytes (count u32, dummy)
and then this many."""
assert FORGET_ONE.size == 16

INVAL_ENTRY_OUT = struct.Struct("=QII")
"""struct fuse_notify_inval_entry_out: 0 8 parent · 8 4 namelen · 12 4 flags; the name follows,
with a terminating zero"""
assert INVAL_ENTRY_OUT.size == 16


def forgotten_nodes(opcode: int, node: int, body: memoryview) -> list[int]:
    """The nodes of a FORGET or BATCH_FORGET request. Raises struct.error when it is too short."""
    if opcode == Opcode.FORGET:
        return [node]
    (count,) = struct.unpack_from("=I", body)
    return [FORGET_ONE.unpack_from(body, 8 + 16 * number)[0] for number in range(count)]


def inval_entry_notification(parent: int, name: bytes) -> bytes:
    """Asks the kernel to drop a name, and with it the inode that nobody uses."""
    body = INVAL_ENTRY_OUT.pack(parent, len(name), 0) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def error_reply(unique: int, errno: int) -> bytes:
    """A reply that carries only an errno (0 for plain success)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, -errno, unique)


def reply(unique: int, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER_SIZE + len(body), 0, unique) + body


def resend_notification() -> bytes:
    """Asks the kernel to send again what a former server read and did not answer (6.9+)."""
    return OUT_HEADER.pack(OUT_HEADER_SIZE, NOTIFY_RESEND, 0)


def directory_attr(nodeid: int) -> bytes:
    return _attr(nodeid, 0, stat.S_IFDIR | 0o555, 2)


def file_attr(nodeid: int, size: int) -> bytes:
    return _attr(nodeid, size, stat.S_IFREG | 0o444, 1)


def _attr(nodeid: int, size: int, mode: int, nlink: int) -> bytes:
    return ATTR.pack(nodeid, size, -(-size // 512), mode, nlink, 0, 0, 0, PAGE_SIZE, 0)


def directory_entry(nodeid: int, next_offset: int, name: bytes, mode: int) -> bytes:
    """One fuse_dirent with its name and padding; `mode` is a file type of stat."""
    head = DIRENT.pack(nodeid, next_offset, len(name), stat.S_IFMT(mode) >> 12)
    return head + name + b"\0" * (-len(name) % 8)
