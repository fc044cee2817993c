"""PAX extended headers: ``length keyword=value\\n`` records with raw byte values."""

from dataclasses import dataclass, field

from imgsnap.errors import FormatError

RECORD = "PAX header"
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."


@dataclass(slots=True)
class PaxRecords:
    """The keywords a container runtime acts on; others (atime, comment, ...) are dropped.

    `hdrcharset` is ignored on purpose: Go and GNU tar write binary values without it.
    """

    path: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime: tuple[int, int] | None = None  # seconds, nanoseconds
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    sparse: list[tuple[bytes, bytes]] = field(default_factory=list)  # in order, 0.0 repeats keys

    def __bool__(self) -> bool:
        return self != _EMPTY

    def update(self, other: "PaxRecords") -> None:
        """Takes over what `other` sets."""
        for name in ("path", "link", "size", "uid", "gid", "mtime"):
            value = getattr(other, name)
            if value is not None:
                setattr(self, name, value)
        self.xattrs.update(other.xattrs)
        self.sparse.extend(other.sparse)

    def merged(self, other: "PaxRecords") -> "PaxRecords":
        result = PaxRecords()
        result.update(self)
        result.update(other)
        return result


_EMPTY = PaxRecords()


def _integer(value: bytes, keyword: str, offset: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise FormatError(RECORD, keyword, offset, f"{value[:40]!r} is not a number")
    return int(value)


def parse_time(value: bytes, offset: int) -> tuple[int, int]:
    """Decimal seconds to (seconds, nanoseconds), rounded down: -5.5 is (-6, 500000000)."""
    negative = value[:1] == b"-"
    whole, _, fraction = (value[1:] if negative else value).partition(b".")
    if not (whole or fraction) or len(value) > 64:
        raise FormatError(RECORD, "mtime", offset, f"{value[:40]!r} is not a time")
    if (whole and not whole.isdigit()) or (fraction and not fraction.isdigit()):
        raise FormatError(RECORD, "mtime", offset, f"{value[:40]!r} is not a time")
    seconds, nanoseconds = int(whole or b"0"), int((fraction + b"000000000")[:9])
    if not negative:
        return seconds, nanoseconds
    return (-seconds - 1, 10**9 - nanoseconds) if nanoseconds else (-seconds, 0)


def parse_pax(body: bytes, offset: int) -> PaxRecords:
    """The records of one extended header that begins at `offset` of the tar.

    Raises FormatError.
    """
    records = PaxRecords()
    position, end = 0, len(body)
    while position < end and body[position]:
        space = body.find(b" ", position, position + 20)
        digits = body[position:space] if space > 0 else b""
        if not digits.isdigit():
            raise FormatError(RECORD, "length", offset + position, "is not a number")
        after = position + int(digits)
        if after <= space or after > end or body[after - 1] != 0x0A:
            raise FormatError(RECORD, "length", offset + position, f"{int(digits)} does not fit")
        keyword, equals, value = body[space + 1 : after - 1].partition(b"=")
        if not equals or not keyword:
            raise FormatError(RECORD, "keyword", offset + position, "no '='")
        _store(records, keyword, value, offset + position)
        position = after
    return records


def _store(records: PaxRecords, keyword: bytes, value: bytes, offset: int) -> None:
    if not value and not keyword.startswith(_XATTR):
        return  # POSIX: as if the record were not there; an xattr's value may be empty
    match keyword:
        case b"path":
            records.path = value
        case b"linkpath":
            records.link = value
        case b"size":
            records.size = _integer(value, "size", offset)
        case b"uid":
            records.uid = _integer(value, "uid", offset)
        case b"gid":
            records.gid = _integer(value, "gid", offset)
        case b"mtime":
            records.mtime = parse_time(value, offset)
        case _ if keyword.startswith(_XATTR):
            records.xattrs[keyword[len(_XATTR) :]] = value
        case _ if keyword.startswith(_SPARSE):
            records.sparse.append((keyword[len(_SPARSE) :], value))
            if keyword == b"GNU.sparse.name":
                records.path = value
