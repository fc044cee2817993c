"""Reading EROFS without a kernel: what erofs_write.py emits, and as little more as possible.

Every length and address is checked before it is used, loops are bounded, and damage raises
FormatError. Inodes are compact or extended, with FLAT_PLAIN or FLAT_INLINE data; anything else
raises UnsupportedFormat. A reader keeps no state but the superblock, so threads may share one.
"""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from imgsnap.errors import FormatError, InvalidArgument, NotFound, UnsupportedFormat
from imgsnap.formats import erofs
from imgsnap.formats.erofs_xattr import decode_xattrs, xattr_body_size
from imgsnap.formats.layer_index import Kind, XattrSet
from imgsnap.units import BLOCK_SIZE

ENTRIES_MAX = 32 << 20
"""Directory entries that a walk visits before it calls the image hostile."""
PATH_MAX = 8192
"""Bytes of a path in a walk, so that deep trees cannot eat memory; twice the kernel's limit."""
DIRECTORY_SIZE_MAX = 1 << 30
"""Bytes; four million entries with names of 255 bytes."""
SYMLINKS_MAX = 40
"""Symlinks followed in one resolution; the kernel's MAXSYMLINKS."""

_KINDS_WITH_DATA = (Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK)


class BlockSource(Protocol):
    """The bytes of a device."""

    @property
    def size(self) -> int:
        """Length in bytes."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length); the caller stays within `size`."""
        ...


@dataclass(frozen=True, slots=True)
class Inode:
    """An inode, checked: its data lies within the device."""

    nid: int
    kind: Kind
    mode: int  # permission bits, 0o7777
    uid: int
    gid: int
    size: int  # bytes
    mtime: int  # seconds
    nsec: int
    nlink: int
    rdev: int  # device number as in the layer index; 0 for what is no device
    block: int  # first block of the data in whole blocks; 0 for a device
    inline: int  # offset in the device of the data after the whole blocks; -1: all in blocks
    xattr_offset: int  # offset in the device of the xattr body
    xattr_size: int  # bytes of it, 0: no xattrs

    @property
    def is_directory(self) -> bool:
        return self.kind == Kind.DIRECTORY


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory."""

    name: bytes
    nid: int
    kind: Kind


class ErofsReader:
    """An EROFS file system on `device`.

    Raises FormatError or UnsupportedFormat at once if the superblock is not good.
    """

    def __init__(self, device: BlockSource) -> None:
        self._device = device
        self.superblock = erofs.parse_superblock(
            self._read(0, BLOCK_SIZE, "superblock") if device.size >= BLOCK_SIZE else b""
        )
        blocks = self.superblock.blocks
        if blocks * BLOCK_SIZE > device.size:
            problem = f"{blocks} blocks on a device of {device.size} bytes"
            raise FormatError("EROFS superblock", "blocks", erofs.SUPER_OFFSET + 36, problem)
        self._meta = self.superblock.meta_block * BLOCK_SIZE

    @property
    def root(self) -> Inode:
        """The root directory."""
        inode = self.inode(self.superblock.root_nid)
        if not inode.is_directory:
            raise _bad(inode.nid, "mode", 0, "the root is not a directory")
        return inode

    def inode(self, nid: int) -> Inode:
        """The inode with this number."""
        at = self._meta + (nid << erofs.SLOT_BITS)
        head = self._read(at, erofs.COMPACT_INODE.size, f"inode {nid}")
        layout = int.from_bytes(head[:2], "little")
        if layout & ~erofs.FORMAT_MASK:
            raise UnsupportedFormat(f"EROFS inode {nid}: format {layout:#x} is not known")
        if layout & 1 == erofs.LAYOUT_COMPACT:
            compact = erofs.CompactInode._make(erofs.COMPACT_INODE.unpack(head))
            record = erofs.ExtendedInode(
                *compact[:3], compact.size, compact.data, compact.ino, compact.uid, compact.gid,
                self.superblock.build_time, self.superblock.build_time_nsec, compact.nlink,
            )  # fmt: skip
            return self._check_inode(nid, at, erofs.COMPACT_INODE.size, record)
        data = self._read(at, erofs.EXTENDED_INODE.size, f"inode {nid}")
        record = erofs.ExtendedInode._make(erofs.EXTENDED_INODE.unpack(data))
        return self._check_inode(nid, at, erofs.EXTENDED_INODE.size, record)

    def _check_inode(self, nid: int, at: int, length: int, record: erofs.ExtendedInode) -> Inode:
        data_layout = record.format >> 1
        if data_layout not in (erofs.FLAT_PLAIN, erofs.FLAT_INLINE):
            raise UnsupportedFormat(f"EROFS inode {nid}: data layout {data_layout} is not known")
        kind = erofs.MODE_KIND.get(stat.S_IFMT(record.mode))
        if kind is None:
            raise _bad(nid, "mode", at, f"{record.mode:#o} is no file type that we know")
        if record.nsec >= 10**9:
            raise _bad(nid, "nsec", at, f"{record.nsec}")
        has_data = kind in _KINDS_WITH_DATA
        if record.size and not has_data:
            raise _bad(nid, "size", at, "a device with data")
        xattr_at = at + length
        xattr_size = xattr_body_size(record.xattr_count)
        inline = -1
        if has_data and data_layout == erofs.FLAT_INLINE and record.size % BLOCK_SIZE:
            inline = xattr_at + xattr_size
        inode = Inode(
            nid, kind, stat.S_IMODE(record.mode), record.uid, record.gid, record.size,
            record.mtime, record.nsec, record.nlink,
            0 if has_data or kind == Kind.FIFO else record.data,
            record.data if has_data else 0,
            inline, xattr_at, xattr_size,
        )  # fmt: skip
        self._check_extent(inode, at)
        return inode

    def _check_extent(self, inode: Inode, at: int) -> None:
        """All data of the inode is inside the device, and inline data inside one block."""
        tail = inode.size % BLOCK_SIZE if inode.inline >= 0 else 0
        whole = inode.size - tail
        if whole and inode.block * BLOCK_SIZE + whole > self._device.size:
            raise _bad(inode.nid, "size", at, f"{inode.size} bytes from block {inode.block}")
        if tail and inode.inline % BLOCK_SIZE + tail > BLOCK_SIZE:
            raise _bad(inode.nid, "size", at, "inline data crosses a block")
        if inode.xattr_offset + inode.xattr_size + tail > self._device.size:
            raise _bad(inode.nid, "xattr_count", at, "is beyond the device")

    def lookup(self, path: bytes) -> Inode:
        """The inode at an absolute or relative path from the root; symlinks are not followed.

        Raises NotFound if there is none, InvalidArgument for ``..``.
        """
        inode = self.root
        for name in _split(path):
            if name == b"..":
                raise InvalidArgument(f"{path!r}: lookup does not know '..', resolve does")
            inode = self._child(inode, name, path)
        return inode

    def resolve(self, path: bytes) -> Inode:
        """The inode at a path, symlinks followed as if the root were the system's.

        Raises NotFound if there is none, or none within SYMLINKS_MAX symlinks.
        """
        trail = [self.root]
        pending = _split(path)[::-1]
        budget = SYMLINKS_MAX
        while pending:
            name = pending.pop()
            if name == b"..":
                del trail[max(1, len(trail) - 1) :]  # the root's parent is the root
                continue
            inode = self._child(trail[-1], name, path)
            if inode.kind != Kind.SYMLINK:
                trail.append(inode)
                continue
            if not budget:
                raise NotFound(f"{_shown(path)}: more than {SYMLINKS_MAX} symlinks")
            budget -= 1
            target = self.readlink(inode)
            pending += _split(target)[::-1]
            if target.startswith(b"/"):
                del trail[1:]
        return trail[-1]

    def _child(self, directory: Inode, name: bytes, path: bytes) -> Inode:
        if not directory.is_directory:
            raise NotFound(f"{_shown(path)}: what should hold {_shown(name)} is not a directory")
        entry = self._find(directory, name)
        if entry is None:
            raise NotFound(f"{_shown(path)}: there is no {_shown(name)} in the snapshot")
        return self._entry_inode(entry)

    def _entry_inode(self, entry: Entry) -> Inode:
        inode = self.inode(entry.nid)
        if inode.kind != entry.kind:
            raise _bad(inode.nid, "mode", 0, f"is not the {entry.kind.name} of {entry.name!r}")
        return inode

    def _find(self, directory: Inode, name: bytes) -> Entry | None:
        """Bisects the directory's blocks, which are in the order of their first names."""
        low, high = 0, _block_count(directory)
        while low < high:
            middle = (low + high) // 2
            entries = self._block_entries(directory, middle)
            if name < entries[0].name:
                high = middle
            elif name > entries[-1].name:
                low = middle + 1
            else:
                return next((entry for entry in entries if entry.name == name), None)
        return None

    def entries(self, directory: Inode) -> Iterator[Entry]:
        """The directory's entries in bytewise order, without ``.`` and ``..``.

        Reads a block at a time; raises FormatError, possibly after some entries, when names are
        out of order or are no names.
        """
        last = b""
        dots = 0
        for number in range(_block_count(directory)):
            for entry in self._block_entries(directory, number):
                if entry.name <= last:
                    raise _bad(directory.nid, "entries", 0, f"{entry.name!r} is not in order")
                last = entry.name
                if entry.name in (b".", b".."):
                    dots += 1
                    if entry.name == b"." and entry.nid != directory.nid:
                        raise _bad(directory.nid, "entries", 0, "'.' is another inode")
                else:
                    yield entry
        if dots != 2:
            raise _bad(directory.nid, "entries", 0, "'.' or '..' is missing")

    def _block_entries(self, directory: Inode, number: int) -> list[Entry]:
        """The entries of one directory block; at least one."""
        data = self.read(directory, number * BLOCK_SIZE, BLOCK_SIZE)

        def bad(problem: str) -> FormatError:
            return _bad(directory.nid, f"directory block {number}", 0, problem)

        if len(data) < erofs.DIRENT.size:
            raise bad("is too short")
        first = erofs.Dirent._make(erofs.DIRENT.unpack_from(data)).name_offset
        if first % erofs.DIRENT.size or not 0 < first < len(data):
            raise bad(f"the first name is at {first}")
        records = [erofs.Dirent._make(raw) for raw in erofs.DIRENT.iter_unpack(data[:first])]
        # The last name ends with the block, or before zeros that fill it up.
        ends = [record.name_offset for record in records[1:]]
        ends.append(len(data))
        entries: list[Entry] = []
        for record, end in zip(records, ends, strict=True):
            if not first <= record.name_offset < end <= len(data):
                raise bad(f"a name from {record.name_offset} to {end}")
            name = data[record.name_offset : end]
            if len(entries) == len(records) - 1:
                name = name.rstrip(b"\0")
            kind = erofs.FILE_TYPE_KIND.get(record.file_type)
            if kind is None:
                raise bad(f"{name!r} has the unknown type {record.file_type}")
            if not 0 < len(name) <= erofs.NAME_MAX or b"\0" in name or b"/" in name:
                raise bad(f"{name[:300]!r} is no name")
            entries.append(Entry(name, record.nid, kind))
        return entries

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symlink."""
        if inode.kind != Kind.SYMLINK:
            raise InvalidArgument(f"EROFS inode {inode.nid} is no symlink")
        if not 0 < inode.size <= erofs.SYMLINK_MAX:
            raise _bad(inode.nid, "size", 0, f"a symlink target of {inode.size} bytes")
        target = self.read(inode, 0, inode.size)
        if b"\0" in target:
            raise _bad(inode.nid, "target", 0, "has a NUL byte")
        return target

    def xattrs(self, inode: Inode) -> XattrSet:
        """The inode's xattrs with full names, sorted by name."""
        if not inode.xattr_size:
            return ()
        body = self._read(inode.xattr_offset, inode.xattr_size, f"xattrs of inode {inode.nid}")
        return decode_xattrs(body, inode.xattr_offset)

    def read(self, inode: Inode, offset: int, length: int) -> bytes:
        """Bytes of a file, symlink or directory; fewer than `length` at its end only."""
        if offset < 0 or length < 0:
            raise InvalidArgument(f"bytes {offset}+{length} make no sense")
        end = min(offset + length, inode.size)
        if offset >= end:
            return b""
        where = f"data of inode {inode.nid}"
        start = inode.block * BLOCK_SIZE
        if inode.inline < 0:
            return self._read(start + offset, end - offset, where)
        whole = inode.size - inode.size % BLOCK_SIZE
        parts = []
        if offset < whole:
            parts.append(self._read(start + offset, min(end, whole) - offset, where))
        if end > whole:
            skip = max(offset - whole, 0)
            parts.append(self._read(inode.inline + skip, end - whole - skip, where))
        return b"".join(parts)

    def walk(self) -> Iterator[tuple[bytes, Inode]]:
        """Every path with its inode, depth first in name order; b"" is the root.

        Raises FormatError for directories that are reached twice (so for every cycle) and after
        ENTRIES_MAX entries.
        """
        root = self.root
        yield b"", root
        seen = {root.nid}
        stack = [(b"", self.entries(root))]
        budget = ENTRIES_MAX
        while stack:
            prefix, entries = stack[-1]
            entry = next(entries, None)
            if entry is None:
                stack.pop()
                continue
            budget -= 1
            path = prefix + entry.name
            if budget < 0 or len(path) > PATH_MAX:
                raise _bad(entry.nid, "entries", 0, f"{path[:100]!r}: too many, or too deep")
            inode = self._entry_inode(entry)
            yield path, inode
            if inode.is_directory:
                if inode.nid in seen:
                    raise _bad(inode.nid, "entries", 0, f"{path[:100]!r} is a second path to it")
                seen.add(inode.nid)
                stack.append((path + b"/", self.entries(inode)))

    def _read(self, offset: int, length: int, what: str) -> bytes:
        """Bytes of the device, all of them or FormatError."""
        if offset + length > self._device.size:
            raise FormatError("EROFS", what, offset, "is beyond the device")
        data = self._device.read(offset, length)
        if len(data) != length:
            raise FormatError("EROFS", what, offset, f"{len(data)} of {length} bytes came")
        return data


def _bad(nid: int, field: str, offset: int, problem: str) -> FormatError:
    return FormatError(f"EROFS inode {nid}", field, offset, problem)


def _split(path: bytes) -> list[bytes]:
    """The names in a path, without empty ones and ``.``."""
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _block_count(directory: Inode) -> int:
    """Directory blocks of a directory."""
    if not directory.is_directory:
        raise InvalidArgument(f"EROFS inode {directory.nid} is not a directory")
    if directory.size > DIRECTORY_SIZE_MAX:
        problem = f"a directory of {directory.size} bytes"
        raise _bad(directory.nid, "size", 0, problem)
    return -(-directory.size // BLOCK_SIZE)


def _shown(path: bytes) -> str:
    """A path for a message."""
    return path.decode("utf-8", "backslashreplace")
