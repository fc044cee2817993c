"""gRPC on unix sockets: channels to containerd, the CRI or our own services, and serving there."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from imgsnap.errors import (
    AccessDenied,
    AlreadyExists,
    Busy,
    ImgsnapError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)

NAMESPACE_HEADER = "containerd-namespace"
LEASE_HEADER = "containerd-lease"
MESSAGE_BYTES_MAX = 16 << 20
"""As containerd's own default (defaults.DefaultMaxRecvMsgSize)."""

_ERRORS: dict[grpc.StatusCode, type[ImgsnapError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.FAILED_PRECONDITION: Busy,
    grpc.StatusCode.ABORTED: Busy,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.CANCELLED: Unavailable,
}


def connect(
    socket: Path,
    *,
    namespace: str | None = None,
    lease: str | None = None,
    timeout: float | None = None,
) -> grpc.Channel:
    """A channel to `socket`; every call carries the namespace and the lease, and ends after
    `timeout` seconds unless it says otherwise itself.

    Nothing is dialled before the first call. Close it, or use it in a `with`. Calls raise
    grpc.RpcError: wrap them in `errors_of`.
    """
    options = [
        # the socket's path, which is the default, is refused as an authority by Go's server
        ("grpc.default_authority", "localhost"),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        # the default doubles up to two minutes, which is for far servers: a restart takes a second
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    channel = grpc.insecure_channel(f"unix:{socket.absolute()}", options=options)
    headers = [(NAMESPACE_HEADER, namespace), (LEASE_HEADER, lease)]
    metadata = tuple((name, value) for name, value in headers if value is not None)
    return grpc.intercept_channel(channel, _AddMetadata(metadata, timeout))


def start_at(server: grpc.Server, address: Path) -> None:
    """Starts a server at the socket `address`, which only root may use. Raises InvalidArgument.

    The socket gets its name when it answers, and takes the place of a killed process's: the caller
    knows that no other process answers there.
    """
    address.parent.mkdir(parents=True, exist_ok=True)
    new = address.with_name(f"{address.name}.new")
    new.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{new}")
    except RuntimeError as error:
        raise InvalidArgument(
            f"cannot listen at {address}", hint="a socket's path has at most 103 bytes here"
        ) from error
    finally:
        os.umask(before)
    server.start()
    new.rename(address)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Turns a grpc.RpcError of the block into an error of imgsnap.errors; `what` says what was
    tried, such as "listing images"."""
    try:
        yield
    except grpc.RpcError as error:
        raise _ours(error, what) from error


def _ours(error: grpc.RpcError, what: str) -> ImgsnapError:
    code = error.code() if isinstance(error, grpc.Call) else None
    details = error.details() if isinstance(error, grpc.Call) else str(error)
    name = code.name if code is not None else "UNKNOWN"
    kind = _ERRORS.get(code, ImgsnapError) if code is not None else ImgsnapError
    return kind(f"{what}: {details} ({name})")


class _Details(NamedTuple):
    """grpc.ClientCallDetails, which is an interface without a constructor."""

    method: str
    timeout: float | None
    metadata: tuple[tuple[str, str], ...]
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _AddMetadata(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, metadata: tuple[tuple[str, str], ...], timeout: float | None) -> None:
        self._metadata = metadata
        self._timeout = timeout

    def _call(self, continuation: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        own = tuple(details.metadata or ())
        timeout = self._timeout if details.timeout is None else details.timeout
        return continuation(
            _Details(
                details.method,
                timeout,
                self._metadata + own,
                details.credentials,
                details.wait_for_ready,
                details.compression,
            ),
            request,
        )

    intercept_unary_unary = _call
    intercept_unary_stream = _call
    intercept_stream_unary = _call
    intercept_stream_stream = _call
