"""Base64 of hostile origin: exactly one spelling of each value."""

import binascii
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode

from imgsnap.errors import FormatError


def standard(text: object, record: str, field: str, size_max: int) -> bytes:
    """RFC 4648, section 4, with padding. Raises FormatError."""
    checked = _checked(text, record, field, size_max)
    try:
        data = b64decode(checked, validate=True)
    except (ValueError, binascii.Error) as error:
        raise FormatError(record, field, 0, "is not base64") from error
    if b64encode(data) != checked:
        raise FormatError(record, field, 0, "is not canonical base64")
    return data


def url(text: object, record: str, field: str, size_max: int) -> bytes:
    """RFC 7515, section 2: URL-safe, without padding. Raises FormatError."""
    checked = _checked(text, record, field, size_max)
    try:
        data = urlsafe_b64decode(checked + b"=" * (-len(checked) % 4))
    except (ValueError, binascii.Error) as error:
        raise FormatError(record, field, 0, "is not base64url") from error
    if urlsafe_b64encode(data).rstrip(b"=") != checked:
        raise FormatError(record, field, 0, "is not canonical base64url")
    return data


def _checked(text: object, record: str, field: str, size_max: int) -> bytes:
    if not isinstance(text, str) or not text.isascii():
        raise FormatError(record, field, 0, "is not an ASCII text")
    if len(text) > size_max // 3 * 4 + 4:
        raise FormatError(
            record, field, 0, f"is {len(text)} characters for at most {size_max} bytes"
        )
    return text.encode("ascii")
