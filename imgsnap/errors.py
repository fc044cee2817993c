"""The error tree. Each class has an exit code for the CLI and an errno for readers of a mount.

Raise the most specific class where the facts are known, carry the facts in the message, and
put what the user can do about it into `hint`.
"""

import errno as _errno


class ImgsnapError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1
    errno = _errno.EIO
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class InvalidArgument(ImgsnapError):
    """What the user or the caller asked for makes no sense."""

    exit_code = 2
    errno = _errno.EINVAL


class InvalidReference(InvalidArgument):
    """A reference that cannot be parsed, or that could mean two things."""


class IntegrityError(ImgsnapError):
    """Bytes are not what their digest or their format says."""

    exit_code = 3


class DigestMismatch(IntegrityError):
    """Content does not hash to the digest it was asked for by."""

    def __init__(self, what: str, expected: str, got: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what}: digest is {got}, expected {expected}", hint=hint)
        self.expected = expected
        self.got = got


class FormatError(IntegrityError):
    """A record that breaks its format: names the record, the field and the byte offset."""

    def __init__(self, record: str, field: str, offset: int, problem: str) -> None:
        super().__init__(f"{record}: {field} at offset {offset}: {problem}")
        self.record = record
        self.field = field
        self.offset = offset


class NotFound(ImgsnapError):
    """A named thing does not exist."""

    exit_code = 4
    errno = _errno.ENOENT


class AccessDenied(ImgsnapError):
    """Credentials are missing or refused, or the process lacks a privilege."""

    exit_code = 5
    errno = _errno.EACCES


class Unavailable(ImgsnapError):
    """A registry or another peer does not answer as it should; trying again may help."""

    exit_code = 6
    retryable = True


class AlreadyExists(ImgsnapError):
    """The thing to be made is there already."""

    exit_code = 7
    errno = _errno.EEXIST


class Unsupported(ImgsnapError):
    """Needs a feature that this version, this kernel or this machine lacks."""

    exit_code = 8
    errno = _errno.EOPNOTSUPP


class UnsupportedFormat(Unsupported):
    """A record of a newer format, or with an incompatible feature we do not know."""


class ResourceExhausted(ImgsnapError):
    """Out of disk or over a limit."""

    exit_code = 9
    errno = _errno.ENOSPC


class LimitExceeded(ResourceExhausted):
    """Input larger than a named limit allows."""

    def __init__(self, limit: str, value: int, maximum: int, *, where: str) -> None:
        super().__init__(
            f"{where}: {value} is over the limit {limit} = {maximum}",
            hint=f"if the input is trusted, raise it with --limit {limit}={value}",
        )
        self.limit = limit
        self.value = value
        self.maximum = maximum


class Busy(ImgsnapError):
    """Something else holds what is needed."""

    exit_code = 10
    errno = _errno.EBUSY


class NotTrusted(ImgsnapError):
    """No signature fulfils what the policy asks for."""

    exit_code = 11
    errno = _errno.EACCES


class OutOfTime(ImgsnapError):
    """It was not done in the time that the user gave it."""

    exit_code = 124  # as timeout(1)
    errno = _errno.ETIMEDOUT
