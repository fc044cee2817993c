"""Lists the members of an uncompressed tar file without extracting: where each one's bytes are.

Reads headers only, in the ustar, GNU (long names) and pax (path, linkpath, size) forms. Hostile
input: every number is checked against the file, names and counts are bounded, sparse members are
refused. Raises FormatError (with the header's byte offset), LimitExceeded or Unsupported.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import FormatError, LimitExceeded, Unsupported

BLOCK = 512
MEMBERS_MAX = 200_000
EXTENSION_SIZE_MAX = 1 << 20
"""Bytes of one long-name or pax record; a path is below 4096 bytes."""
LINKS_MAX = 8
_MAGICS = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
    (b"BZh", "bzip2", "bunzip2"),
)
_FILE_TYPES = (b"0", b"\0", b"7")
_IGNORED_TYPES = (b"5", b"3", b"4", b"6", b"x", b"g")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file's bytes at [offset, offset + size) of the tar, or a link's target."""

    name: str
    offset: int
    size: int
    link: str | None = None


class TarIndex:
    """The files of a tar by name; links are followed inside the tar."""

    def __init__(self, members: dict[str, TarMember], what: str) -> None:
        self._members = members
        self._what = what

    def find(self, name: str) -> TarMember | None:
        """The regular file with this name, None when there is none.

        Raises FormatError for a chain of links that does not end.
        """
        path = _clean(name)
        for _ in range(LINKS_MAX):
            member = self._members.get(path) if path is not None else None
            if member is None or member.link is None:
                return member
            path = _clean(member.link)
        raise FormatError(self._what, name[:100], 0, f"is over {LINKS_MAX} links away from a file")

    def __len__(self) -> int:
        return len(self._members)


def read_tar_index(fd: int, path: Path) -> TarIndex:
    """Indexes the tar open as `fd`; of two members with one name the last counts, as for tar.

    Raises Unsupported for a compressed file, with the command that unpacks it.
    """
    what = str(path)
    head = os.pread(fd, BLOCK, 0)
    compression = compression_of(head)
    if compression is not None:
        raise Unsupported(
            f"{what} is compressed with {compression[0]}: random access needs a plain tar",
            hint=f"unpack it first: {compression[1]} {what}",
        )
    members: dict[str, TarMember] = {}
    for count, member in enumerate(_members(fd, os.fstat(fd).st_size, what)):
        if count >= MEMBERS_MAX:
            raise LimitExceeded("oci.tar_members_max", count + 1, MEMBERS_MAX, where=what)
        name = _clean(member.name)
        if name is not None:
            members[name] = member
    return TarIndex(members, what)


def compression_of(head: bytes) -> tuple[str, str] | None:
    """The compression that a file's first bytes show, with the command to undo it."""
    for magic, name, command in _MAGICS:
        if head.startswith(magic):
            return name, command
    return None


def _members(fd: int, end: int, what: str) -> Iterator[TarMember]:
    position = 0
    long_names: dict[str, str] = {}
    while position + BLOCK <= end:
        header = os.pread(fd, BLOCK, position)
        if len(header) < BLOCK or header == bytes(BLOCK):
            return
        _check_sum(header, position, what)
        kind = header[156:157]
        size = _number(header[124:136], position, what)
        if kind in _FILE_TYPES and "size" in long_names:
            size = _decimal(long_names["size"], position, what)
        data = position + BLOCK
        if kind in (b"1", b"2", b"5"):
            size = 0  # Links and directories have no data, whatever their header says.
        if data + size > end:
            raise FormatError(what, "size", position, f"{size} bytes reach past the end")
        if kind in (b"L", b"K", b"x"):
            long_names |= _extension(fd, kind, data, size, what)
        else:
            member = _member(header, kind, data, size, position, what, long_names)
            if member is not None:
                yield member
            if kind != b"g":
                long_names = {}
        position = data + -(-size // BLOCK) * BLOCK


def _member(
    header: bytes,
    kind: bytes,
    data: int,
    size: int,
    position: int,
    what: str,
    long_names: dict[str, str],
) -> TarMember | None:
    name = long_names.get("path") or _name(header)
    if kind in _FILE_TYPES:
        if any(key.startswith("GNU.sparse") for key in long_names):
            raise FormatError(what, "type", position, "is a sparse file")
        return TarMember(name, data, size)
    if kind in (b"1", b"2"):
        target = long_names.get("linkpath") or _text(header[157:257])
        if kind == b"2":  # A symbolic link's target is relative to its own directory.
            target = target if target.startswith("/") else f"{name.rpartition('/')[0]}/{target}"
        return TarMember(name, data, 0, target)
    if kind not in _IGNORED_TYPES:
        raise FormatError(what, "type", position, f"{kind!r} is not known")
    return None


def _extension(fd: int, kind: bytes, data: int, size: int, what: str) -> dict[str, str]:
    if size > EXTENSION_SIZE_MAX:
        raise LimitExceeded("oci.tar_extension_size_max", size, EXTENSION_SIZE_MAX, where=what)
    raw = os.pread(fd, size, data)
    if kind == b"x":
        return dict(_pax_records(raw, data, what))
    return {"path" if kind == b"L" else "linkpath": _text(raw)}


def _pax_records(raw: bytes, offset: int, what: str) -> Iterator[tuple[str, str]]:
    """Records of the form ``LENGTH KEY=VALUE\\n``, the length counting itself."""
    position = 0
    while position < len(raw):
        digits, space, _ = raw[position : position + 20].partition(b" ")
        if not space or not digits.isdigit():
            raise FormatError(what, "pax record", offset + position, "has no length")
        length = int(digits)
        record = raw[position + len(digits) + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if position + length > len(raw) or not equals or not record.endswith(b"\n"):
            raise FormatError(what, "pax record", offset + position, "is malformed")
        yield key.decode("utf-8", "replace"), value[:-1].decode("utf-8", "surrogateescape")
        position += length


def _check_sum(header: bytes, position: int, what: str) -> None:
    expected = _number(header[148:156], position, what)
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != expected:
        raise FormatError(what, "checksum", position, "does not match: not a tar, or damaged")


def _number(field: bytes, position: int, what: str) -> int:
    """Octal text, or base 256 when the top bit is set (GNU, for sizes from 8 GiB)."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value >= 1 << 63:
            raise FormatError(what, "number", position, "is negative or over 63 bits")
        return value
    text = field.split(b"\0", 1)[0].strip()
    if not all(0x30 <= byte <= 0x37 for byte in text):
        raise FormatError(what, "number", position, f"{field!r} is not octal")
    return int(text or b"0", 8)


def _decimal(text: str, position: int, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 19):
        raise FormatError(what, "size", position, f"{text[:40]!r} is not a size")
    return int(text)


def _name(header: bytes) -> str:
    name = _text(header[:100])
    # GNU headers ("ustar  ") keep times where POSIX ones keep the prefix.
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _clean(name: str) -> str | None:
    """The name relative to the tar's root; None when it would lead out of it."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)
