"""EROFS inline xattrs: the body between an inode and its inline data."""

from collections.abc import Callable

from imgsnap.errors import FormatError, Unsupported, UnsupportedFormat
from imgsnap.formats import erofs
from imgsnap.formats.layer_index import XattrSet
from imgsnap.units import align_up

XATTR_NAME_MAX = 255  # bytes, of the full name; XATTR_NAME_MAX of Linux
XATTR_VALUE_MAX = 0xFFFF  # bytes; the size field is a u16 (Linux itself allows 65 536)

_WHOLE = {
    b"system.posix_acl_access": erofs.XATTR_ACL_ACCESS,
    b"system.posix_acl_default": erofs.XATTR_ACL_DEFAULT,
}
_PREFIXES = {
    b"user.": erofs.XATTR_USER,
    b"trusted.": erofs.XATTR_TRUSTED,
    b"security.": erofs.XATTR_SECURITY,
}
_WHOLE_NAMES = {number: name for name, number in _WHOLE.items()}
_PREFIX_NAMES = {number: prefix for prefix, number in _PREFIXES.items()}


def _split_name(name: bytes, where: Callable[[], str]) -> tuple[int, bytes]:
    """Prefix number and the rest of a full xattr name."""
    if name in _WHOLE:
        return _WHOLE[name], b""
    namespace, dot, rest = name.partition(b".")
    number = _PREFIXES.get(namespace + dot)
    if number is None or not rest:
        raise Unsupported(
            f"{where()}: EROFS cannot store the xattr {name!r}",
            hint="its namespace must be user, trusted, security or system.posix_acl_*",
        )
    return number, rest


def _too_large(where: Callable[[], str], what: str, size: int, maximum: int) -> Unsupported:
    return Unsupported(f"{where()}: {what}: {size} bytes, EROFS has room for {maximum}")


def encode_xattrs(xattrs: XattrSet, where: Callable[[], str]) -> bytes:
    """The xattr body of an inode, header included; a multiple of 4 bytes, never empty.

    `where` tells the inode's path, for errors. Raises Unsupported for a namespace that EROFS has no
    number for and for what is too large for its fields.
    """
    parts = [erofs.XATTR_HEADER.pack(0, 0)]
    for name, value in xattrs:
        if len(name) > XATTR_NAME_MAX:
            raise _too_large(where, "an xattr name", len(name), XATTR_NAME_MAX)
        if len(value) > XATTR_VALUE_MAX:
            raise _too_large(where, f"the value of {name!r}", len(value), XATTR_VALUE_MAX)
        number, rest = _split_name(name, where)
        size = erofs.XATTR_ENTRY.size + len(rest) + len(value)
        parts.append(erofs.XATTR_ENTRY.pack(len(rest), number, len(value)))
        parts += (rest, value, bytes(-size & 3))
    body = b"".join(parts)
    if len(body) > erofs.XATTR_BODY_MAX:
        raise _too_large(where, "the xattrs together", len(body), erofs.XATTR_BODY_MAX)
    return body


def xattr_count(body_size: int) -> int:
    """The inode's xattr_count for a body of `body_size` bytes."""
    return 1 + (body_size - erofs.XATTR_HEADER.size) // 4 if body_size else 0


def xattr_body_size(count: int) -> int:
    """Bytes of the body that an inode with this xattr_count has."""
    return erofs.XATTR_HEADER.size + 4 * (count - 1) if count else 0


def _full_name(number: int, rest: bytes, offset: int) -> bytes:
    if number in _WHOLE_NAMES and not rest:
        return _WHOLE_NAMES[number]
    prefix = _PREFIX_NAMES.get(number)
    if prefix is None:
        raise UnsupportedFormat(f"EROFS xattr at offset {offset}: prefix {number} is not known")
    if not rest or b"\0" in rest:
        raise FormatError("EROFS xattr", "name", offset, f"{rest!r} is no name")
    return prefix + rest


def decode_xattrs(body: bytes, base: int) -> XattrSet:
    """The xattrs in `body`, sorted by name; `base` is its offset in the device, for errors.

    Raises FormatError for damage, UnsupportedFormat for shared xattrs and unknown prefixes.
    """
    header = erofs.XattrHeader._make(erofs.XATTR_HEADER.unpack_from(body))
    if header.shared:
        raise UnsupportedFormat(f"EROFS inode at offset {base}: shared xattrs are not known")
    found: dict[bytes, bytes] = {}
    at = erofs.XATTR_HEADER.size
    while at < len(body):
        entry = erofs.XattrEntry._make(erofs.XATTR_ENTRY.unpack_from(body, at))
        name_at = at + erofs.XATTR_ENTRY.size
        value_at = name_at + entry.name_size
        end = value_at + entry.value_size
        if end > len(body):
            raise FormatError("EROFS xattr", "value_size", base + at, "is beyond the xattr body")
        name = _full_name(entry.prefix, body[name_at:value_at], base + at)
        if name in found:
            raise FormatError("EROFS xattr", "name", base + at, f"{name!r} appears twice")
        found[name] = body[value_at:end]
        at = align_up(end, 4)
    return tuple(sorted(found.items()))
