"""A request to be sent, an answer being read, and the counters of a transport."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from imgsnap.errors import LimitExceeded
from imgsnap.oci.auth import Scope
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.http_errors import RegistryUnavailable, connection_error, redact
from imgsnap.oci.retry import Counters

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

READ_SIZE = 1 << 20
"""Bytes asked of the socket at a time when a whole body is read."""
DRAIN_MAX = 16 << 10
"""Unread bytes that are cheaper to read than a new TLS connection is to make: a redirect's page."""


class TransportStats(Counters):
    """Counts requests, retries, connection_errors, bytes_received, bytes_sent and status_NNN.

    bytes_received counts bodies only. Thread safe.
    """


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body that can be sent more than once. `size` in bytes."""

    open: Callable[[], BinaryIO]
    size: int

    @staticmethod
    def of_bytes(data: bytes) -> "Body":
        """A body held in memory."""
        return Body(lambda: io.BytesIO(data), len(data))

    @staticmethod
    def of_file(path: Path, size: int) -> "Body":
        """A body streamed from a file."""
        return Body(lambda: path.open("rb"), size)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `target` is a path on the registry, or an absolute URL.

    `accept` are the statuses that are answers rather than errors. `redirect_key` names a blob
    whose redirect target may be remembered. `retry` False leaves retrying to the caller.
    `timeout_s` bounds the silence between two packets instead of the connection's own limit.
    """

    method: str
    target: str
    scope: Scope = field(default_factory=Scope)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    accept: frozenset[int] = frozenset({200})
    redirect_key: str | None = None
    retry: bool = True
    cancellation: Cancellation | None = None
    timeout_s: float | None = None


class Response:
    """An answer whose body is read from the connection; a context manager.

    Closing it before the end of the body gives the connection up, which is how an unwanted
    body is refused.
    """

    def __init__(
        self,
        raw: "BaseHTTPResponse",
        url: str,
        stats: TransportStats,
        cancellation: Cancellation | None = None,
    ) -> None:
        self._raw = raw
        self._stats = stats
        self._cancellation = cancellation
        self._complete = False
        self._broken = False
        self.url = url
        self.status = raw.status
        self.headers = raw.headers

    @property
    def ok(self) -> bool:
        """Whether the status is 2xx."""
        return 200 <= self.status < 300

    @property
    def content_length(self) -> int | None:
        """The Content-Length header in bytes; None when absent or no number."""
        text = self.headers.get("content-length", "").strip()
        return int(text) if text.isascii() and text.isdigit() else None

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, b"" at the end.

        Raises RegistryUnavailable when the body breaks off.
        """
        import http.client

        import urllib3

        try:
            data = self._raw.read(size, decode_content=False)
        except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            self._broken = True
            if self._cancellation is not None:
                self._cancellation.check()
            self._stats.add("connection_errors")
            plain_http = self.url.startswith("http:")
            raise connection_error(
                error, method="read of", url=self.url, plain_http=plain_http
            ) from error
        if not data and size:
            self._complete = True
        self._stats.add("bytes_received", len(data))
        return data

    def read_up_to(self, size: int) -> bytes:
        """At most `size` bytes from here on; less only when the body ends."""
        parts: list[bytes] = []
        while size > 0 and (data := self.read(min(size, READ_SIZE))):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def body(self, size_max: int) -> bytes:
        """The whole body. Raises LimitExceeded when it is longer than `size_max` bytes."""
        data = self.read_up_to(size_max + 1)
        if len(data) > size_max:
            raise LimitExceeded(
                "oci.answer_size_max", len(data), size_max, where=f"answer of {redact(self.url)}"
            )
        return data

    def exactly(self, size: int) -> bytes:
        """A body of exactly `size` bytes.

        Raises RegistryUnavailable when it is shorter or longer: its framing cannot be trusted.
        """
        data = self.read_up_to(size + 1)
        if len(data) != size:
            got = f"{len(data)}" if len(data) < size else f"more than {size}"
            raise RegistryUnavailable(f"{redact(self.url)}: {got} bytes came, {size} expected")
        return data

    def close(self) -> None:
        """Returns the connection to the pool, or drops it when much of the body is unread."""
        if self._cancellation is not None:
            self._cancellation.watch(None)  # the pool may give the socket to another request
        left = self._raw.length_remaining
        if not self._broken and (self._complete or (left is not None and left <= DRAIN_MAX)):
            self._raw.drain_conn()
            self._raw.release_conn()
        else:
            self._raw.close()

    def __enter__(self) -> "Response":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
