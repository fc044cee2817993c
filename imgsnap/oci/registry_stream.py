"""A registry's blob as a stream that survives broken connections."""

import re
from dataclasses import replace

from imgsnap.errors import IntegrityError, Unavailable
from imgsnap.oci.http_errors import RegistryUnavailable, redact
from imgsnap.oci.http_message import READ_SIZE, Request, Response
from imgsnap.oci.repository import Descriptor, RangeUnsupported
from imgsnap.oci.retry import Attempts
from imgsnap.oci.transport import Transport

_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,20})-(\d{1,20})/(\d{1,20}|\*)")


def check_range_answer(
    response: Response, offset: int, length: int, descriptor: Descriptor
) -> None:
    """Checks that a 206 is the range asked for: start, end, total and Content-Length.

    Raises RangeUnsupported when it is another part (RFC 9110 lets servers send less, and some
    send several as multipart), IntegrityError when the blob's total size is not the descriptor's.
    """
    said = response.headers.get("content-range", "").strip()
    match = _CONTENT_RANGE.fullmatch(said)
    url = redact(response.url)
    if not match or (int(match[1]), int(match[2])) != (offset, offset + length - 1):
        raise RangeUnsupported(
            f"{url}: asked for bytes {offset}-{offset + length - 1}, got {said[:80]!r}",
            hint="a cache or proxy before the registry does not handle ranges",
        )
    if match[3] != "*" and int(match[3]) != descriptor.size:
        raise IntegrityError(
            f"{url}: the blob has {match[3]} bytes, its descriptor says {descriptor.size}"
        )
    if response.content_length not in (None, length):
        raise RangeUnsupported(f"{url}: {response.content_length} bytes for a range of {length}")


class RangeReader:
    """Reads bytes [offset, offset + length) of a blob; a RangeStream. Not thread safe.

    A transfer that breaks off continues at the byte where it broke; one that stalls, after the last
    piece read. Always closed ranges, since some servers answer 416 to an open one.
    """

    def __init__(
        self,
        transport: Transport,
        request: Request,
        descriptor: Descriptor,
        offset: int,
        length: int,
    ) -> None:
        self.host = transport.host
        self._transport = transport
        self._request = request
        self._descriptor = descriptor
        self._offset = offset
        self._end = offset + length
        self._attempts = Attempts(transport.retry, request.cancellation)
        self._response: Response | None = self._open()

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes, fewer at the end of the range only.

        Raises Unavailable when the transfer breaks and cannot be resumed, RangeUnsupported when the
        server does not resume it.
        """
        parts: list[bytes] = []
        left = min(size, self._end - self._offset)
        while left:
            response = self._response or self._open()
            self._response = response
            try:
                data = response.read(left)
                if not data:
                    raise RegistryUnavailable(
                        f"{redact(response.url)}: ended {self._end - self._offset} bytes early"
                    )
            except Unavailable as error:
                self.close()
                self._transport.failed(self._attempts, error, self._request)
                continue
            self._attempts.progressed()
            self._transport.answered()
            self._offset += len(data)
            left -= len(data)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def reject(self) -> None:
        """Nothing to be done: there is no other host."""

    def close(self) -> None:
        """Gives the connection back, or up when the range was not read to its end."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _open(self) -> Response:
        headers = {"Range": f"bytes={self._offset}-{self._end - 1}"}
        response = self._transport.open(replace(self._request, headers=headers))
        try:
            length = self._end - self._offset
            if response.status == 206:
                check_range_answer(response, self._offset, length, self._descriptor)
            elif length != self._descriptor.size or response.content_length not in (None, length):
                raise RangeUnsupported(
                    f"{redact(response.url)}: the server sends the whole blob for a range",
                    hint="a pull-through cache does so until it holds the blob",
                )
        except BaseException:
            response.close()
            raise
        return response


class BlobStream:
    """Reads a blob from its start; a ByteStream. Not thread safe.

    A broken transfer continues with a closed range at the current offset, or from the start
    with what is already delivered thrown away where the server knows no ranges.
    """

    def __init__(
        self, transport: Transport, request: Request, descriptor: Descriptor, name: str
    ) -> None:
        self._transport = transport
        self._request = request
        self._descriptor = descriptor
        self._what = f"blob {descriptor.digest} of {name}"
        self._offset = 0
        self._attempts = Attempts(transport.retry)
        self._response: Response | None = None
        self._ranges = True
        self._open()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end.

        Raises Unavailable when the transfer breaks and cannot be resumed, IntegrityError when
        the blob is longer than its descriptor says.
        """
        if size <= 0:
            return b""
        while True:
            try:
                return self._read_once(size)
            except Unavailable as error:
                self.close()
                self._transport.failed(self._attempts, error, self._request)

    def close(self) -> None:
        """Gives the connection back, or up when the blob was not read to its end."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def _read_once(self, size: int) -> bytes:
        response = self._response or self._open()
        # One byte more than is left, so that a blob that is too long is seen.
        data = response.read(min(size, self._descriptor.size - self._offset + 1))
        if self._offset + len(data) > self._descriptor.size:
            raise IntegrityError(f"{self._what}: longer than its {self._descriptor.size} bytes")
        if not data and self._offset < self._descriptor.size:
            raise RegistryUnavailable(
                f"{self._what}: ended at byte {self._offset} of {self._descriptor.size}"
            )
        if data:
            self._offset += len(data)
            self._attempts.progressed()
            self._transport.answered()
        return data

    def _open(self) -> Response:
        size = self._descriptor.size
        request = self._request
        if self._offset and self._ranges and self._offset < size:
            headers = {"Range": f"bytes={self._offset}-{size - 1}"}
            request = Request(
                request.method,
                request.target,
                request.scope,
                headers=headers,
                accept=frozenset({200, 206}),
                redirect_key=request.redirect_key,
            )
        try:
            response = self._transport.open(request)
            self._position(response)
        except RangeUnsupported:
            self._ranges = False
            response = self._transport.open(self._request)
            self._position(response)
        self._response = response
        return response

    def _position(self, response: Response) -> None:
        """Checks the answer and moves it to the current offset."""
        try:
            size = self._descriptor.size
            if response.status == 206:
                check_range_answer(response, self._offset, size - self._offset, self._descriptor)
                return
            if response.content_length not in (None, size):
                raise IntegrityError(
                    f"{self._what}: has {response.content_length} bytes, its descriptor says {size}"
                )
            left = self._offset
            while left and (data := response.read(min(left, READ_SIZE))):
                left -= len(data)
            if left:
                raise RegistryUnavailable(f"{self._what}: ended before byte {self._offset}")
        except BaseException:
            response.close()
            raise
