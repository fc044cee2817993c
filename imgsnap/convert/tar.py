"""A tar reader for untrusted layers: ustar, GNU and PAX headers, over a buffer.

Python's tarfile builds an object graph per entry and costs 4 to 7 times as much; it also loses
nanoseconds and raw xattr bytes. Sources: POSIX.1-2017 pax, GNU tar manual (basic and sparse
formats), OCI image-spec layer.md.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from imgsnap.convert.limits import NAME_MAX, PATH_MAX, Limits
from imgsnap.convert.pax import PaxRecords, parse_pax
from imgsnap.convert.sparse import gnu_old_map, pax_map
from imgsnap.errors import FormatError, Unsupported
from imgsnap.formats.layer_index import Kind

RECORD = "layer tar"
BLOCK = 512

Segment = tuple[int, int, int]
"""(offset in the file, offset in the tar, length): bytes outside all segments are zeros."""

HARD_LINK = 0
"""`TarEntry.kind` of a hard link; the others are Kind values."""


class TarEntry(NamedTuple):
    """One entry, headers merged. `path` and a hard link's `link` are normalised."""

    kind: int
    path: bytes  # no leading "./", no trailing "/"; b"" is the root
    link: bytes  # symlink target as written, or path of a hard link's target
    mode: int  # 0o7777
    uid: int
    gid: int
    mtime: int  # seconds
    nsec: int
    size: int  # bytes, files only
    segments: tuple[Segment, ...]
    major: int
    minor: int
    xattrs: tuple[tuple[bytes, bytes], ...]


# offset size field: 0 100 name · 100 8 mode · 108 8 uid · 116 8 gid · 124 12 size · 136 12 mtime ·
# 148 8 checksum · 156 1 typeflag · 157 100 linkname · 257 8 magic+version · 265 64 uname, gname ·
# 329 8 devmajor · 337 8 devminor · 345 155 prefix · 500 12 pad
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
assert _HEADER.size == BLOCK

_KINDS = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
    b"1": HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHAR_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
}
_EXTENSIONS = b"xgLKV"
_ZERO_BLOCK = bytes(BLOCK)
_CHECKSUM_FIELD = slice(148, 156)
_SPACES = sum(b" " * 8)


def _number(raw: bytes, field: str, offset: int) -> int:
    """Octal text, or GNU base-256 when the first bit is set (may be negative)."""
    text = raw.strip(b"\0 ")
    if text.isdigit():
        try:
            return int(text, 8)
        except ValueError:
            pass  # an 8 or a 9
    if not text:
        return 0
    if raw[0] == 0xFF:
        return int.from_bytes(raw, "big", signed=True)
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    text = raw.split(b"\0", 1)[0].strip(b" ")  # some writers leave rubbish after the NUL
    if text.isdigit() and not set(text) & {0x38, 0x39}:
        return int(text, 8)
    raise FormatError(RECORD, field, offset, f"{raw!r} is not octal")


def normalise(path: bytes, offset: int, *, strip_root: bool) -> bytes:
    """A path relative to the image root. Refuses ``..``, and absolute names unless `strip_root`.

    Raises FormatError.
    """
    if path[:1] == b"/" and not strip_root:
        raise FormatError(RECORD, "name", offset, f"{path[:200]!r} is absolute")
    if b"\0" in path:
        raise FormatError(RECORD, "name", offset, f"{path[:200]!r} holds a NUL")
    if len(path) > PATH_MAX:
        raise FormatError(RECORD, "name", offset, f"is {len(path)} bytes, over {PATH_MAX}")
    parts = path.split(b"/")
    if b"" in parts or b"." in parts:
        parts = [part for part in parts if part and part != b"."]
    if b".." in parts:
        raise FormatError(RECORD, "name", offset, f"{path[:200]!r} holds '..'")
    if len(path) > NAME_MAX and any(len(part) > NAME_MAX for part in parts):
        raise FormatError(RECORD, "name", offset, f"a component is over {NAME_MAX} bytes")
    return b"/".join(parts)


class TarReader:
    """Iterates the entries of a whole tar in `buffer` (bytes, mmap or memoryview).

    Raises FormatError naming field and offset, Unsupported for entry types that no container
    runtime knows, LimitExceeded. A tar that ends without its two zero blocks is accepted when it
    ends on an entry's boundary (some writers leave them out).
    """

    def __init__(self, buffer: memoryview, limits: Limits, *, strip_root: bool = False) -> None:
        self.buffer = buffer
        self._limits = limits
        self._strip_root = strip_root
        self._global = PaxRecords()
        self.position = 0  # bytes consumed, for progress and for dropping pages

    def __iter__(self) -> Iterator[TarEntry]:
        buffer, end = self.buffer, len(self.buffer)
        local: PaxRecords | None = None
        long_name: bytes | None = None
        long_link: bytes | None = None
        count = 0
        while self.position + BLOCK <= end:
            offset = self.position
            header = bytes(buffer[offset : offset + BLOCK])
            if header == _ZERO_BLOCK:
                break
            self._verify_checksum(header, offset)
            fields = _HEADER.unpack(header)
            typeflag: bytes = fields[7]
            if typeflag in _EXTENSIONS:
                body = self._extension(fields, offset)
                if typeflag == b"x":
                    local = parse_pax(body, offset + BLOCK)
                elif typeflag == b"g":
                    self._global.update(parse_pax(body, offset + BLOCK))
                elif typeflag == b"L":
                    long_name = body.rstrip(b"\0")
                elif typeflag == b"K":
                    long_link = body.rstrip(b"\0")
                continue
            count += 1
            self._limits.check("entries", count, where=RECORD)
            yield self._entry(header, fields, offset, self._merged(local), long_name, long_link)
            local = long_name = long_link = None
        else:
            if self.position != end:
                raise FormatError(RECORD, "header", self.position, "the tar is cut off")
        if local is not None or long_name is not None or long_link is not None:
            raise FormatError(RECORD, "header", self.position, "extension header without entry")

    @staticmethod
    def _verify_checksum(header: bytes, offset: int) -> None:
        stated = _number(header[_CHECKSUM_FIELD], "checksum", offset + 148)
        unsigned = sum(header) - sum(header[_CHECKSUM_FIELD]) + _SPACES
        if stated == unsigned:
            return
        # Some old writers summed signed characters.
        high = sum(byte >> 7 for byte in header) - sum(b >> 7 for b in header[_CHECKSUM_FIELD])
        if stated != unsigned - 256 * high:
            raise FormatError(RECORD, "checksum", offset + 148, f"{stated}, computed {unsigned}")

    def _merged(self, local: PaxRecords | None) -> PaxRecords | None:
        if local is None:
            return self._global if self._global else None
        return self._global.merged(local) if self._global else local

    def _data(self, offset: int, size: int, field: str) -> memoryview:
        """The data after the header at `offset`; moves past its padding."""
        start = offset + BLOCK
        if size < 0 or start + size > len(self.buffer):
            raise FormatError(RECORD, field, offset, f"{size} bytes of data, the tar is cut off")
        self.position = min(start + -(-size // BLOCK) * BLOCK, len(self.buffer))
        return self.buffer[start : start + size]

    def _extension(self, fields: tuple[bytes, ...], offset: int) -> bytes:
        size = _number(fields[4], "size", offset + 124)
        self._limits.check("header_size", size, where=f"{RECORD}: extension at {offset}")
        return bytes(self._data(offset, size, "extension"))

    def _entry(
        self,
        header: bytes,
        fields: tuple[bytes, ...],
        offset: int,
        pax: PaxRecords | None,
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> TarEntry:
        (
            name,
            mode,
            uid,
            gid,
            size_raw,
            mtime_raw,
            _,
            typeflag,
            link,
            magic,
            major,
            minor,
            prefix,
        ) = fields
        kind = _KINDS.get(typeflag)
        if kind is None:
            raise Unsupported(f"{RECORD}: entry type {typeflag!r} at offset {offset}")
        path = name.split(b"\0", 1)[0]
        if magic[:6] == b"ustar\0" and prefix[0]:
            path = prefix.split(b"\0", 1)[0] + b"/" + path
        path = path if long_name is None else long_name
        link = link.split(b"\0", 1)[0] if long_link is None else long_link
        size = _number(size_raw, "size", offset + 124)
        owner = _number(uid, "uid", offset + 108), _number(gid, "gid", offset + 116)
        mtime, nsec = _number(mtime_raw, "mtime", offset + 136), 0
        xattrs: tuple[tuple[bytes, bytes], ...] = ()
        if pax is not None:
            path = pax.path if pax.path is not None else path
            link = pax.link if pax.link is not None else link
            size = pax.size if pax.size is not None else size
            owner = (
                owner[0] if pax.uid is None else pax.uid,
                owner[1] if pax.gid is None else pax.gid,
            )
            if pax.mtime is not None:
                mtime, nsec = pax.mtime
            xattrs = self._xattrs(pax, offset)
        if kind == Kind.FILE and path[-1:] == b"/" and typeflag in b"0\0":
            kind = Kind.DIRECTORY  # pre-POSIX tars mark directories so
        if kind == Kind.FILE:
            content, segments = self._content(header, offset, size, pax)
        else:
            content, segments = 0, ()
            # Only files carry data. What other headers state as size is not followed by any.
            self.position = offset + BLOCK
        if kind == HARD_LINK:
            link = normalise(link, offset + 157, strip_root=True)
        self._check_owner(owner, offset)
        device = kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE)
        return TarEntry(
            kind,
            normalise(path, offset, strip_root=self._strip_root),
            link,
            _number(mode, "mode", offset + 100) & 0o7777,
            owner[0],
            owner[1],
            self._check_time(mtime, offset),
            nsec,
            content,
            segments,
            _number(major, "devmajor", offset + 329) if device else 0,
            _number(minor, "devminor", offset + 337) if device else 0,
            xattrs,
        )

    def _content(
        self, header: bytes, offset: int, size: int, pax: PaxRecords | None
    ) -> tuple[int, tuple[Segment, ...]]:
        """(bytes of the file, where they are in the tar)."""
        if header[156:157] == b"S":
            extra, real, chunks = gnu_old_map(self.buffer, header, offset)
            data = offset + BLOCK + extra
            self._data(offset + extra, size, "size")
        elif pax is not None and pax.sparse:
            stored = self._data(offset, size, "size")
            skip, real, chunks = pax_map(pax.sparse, stored, offset + BLOCK)
            data, size = offset + BLOCK + skip, size - skip
        else:
            self._limits.check("file_size", size, where=f"{RECORD}: file at {offset}")
            self._data(offset, size, "size")
            return size, ((0, offset + BLOCK, size),) if size else ()
        self._limits.check("file_size", real, where=f"{RECORD}: sparse file at {offset}")
        return real, _place(chunks, data, size, real, offset)

    def _xattrs(self, pax: PaxRecords, offset: int) -> tuple[tuple[bytes, bytes], ...]:
        if not pax.xattrs:
            return ()
        total = sum(len(name) + len(value) for name, value in pax.xattrs.items())
        self._limits.check("xattr_size", total, where=f"{RECORD}: entry at {offset}")
        return tuple(sorted(pax.xattrs.items()))

    @staticmethod
    def _check_owner(owner: tuple[int, int], offset: int) -> None:
        for field, value in zip(("uid", "gid"), owner, strict=True):
            if not 0 <= value < 1 << 32:
                raise FormatError(RECORD, field, offset, f"{value} does not fit 32 bits")

    @staticmethod
    def _check_time(mtime: int, offset: int) -> int:
        if not -(1 << 63) <= mtime < 1 << 63:
            raise FormatError(RECORD, "mtime", offset, f"{mtime} does not fit 64 bits")
        return mtime


def _place(
    chunks: list[tuple[int, int]], data: int, stored: int, real: int, offset: int
) -> tuple[Segment, ...]:
    """Segments of a sparse file from its (offset, length) map. Raises FormatError."""
    segments = []
    end = used = 0
    for start, length in chunks:
        if length < 0 or start < end or start + length > real or used + length > stored:
            raise FormatError(RECORD, "sparse map", offset, f"bad region ({start}, {length})")
        if length:
            segments.append((start, data + used, length))
        end, used = start + length, used + length
    return tuple(segments)
