"""The snapshots service of containerd's API over `Snapshots`: messages and status codes."""

import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import empty_pb2

from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2 as messages
from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2_grpc as stubs
from imgsnap.containerd.api.types import mount_pb2
from imgsnap.errors import (
    AccessDenied,
    AlreadyExists,
    Busy,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unsupported,
)
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.mount_forms import Mount
from imgsnap.snapshotter.rows import Row, WrongState
from imgsnap.snapshotter.snapshots import Snapshots

LIST_BATCH = 100
"""Rows in one message of List, as containerd's own service sends."""
MAY_WAIT = ("Prepare", "View", "Mounts")

_CODES: tuple[tuple[type[ImgsnapError], grpc.StatusCode], ...] = (
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (Busy, grpc.StatusCode.FAILED_PRECONDITION),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unsupported, grpc.StatusCode.UNIMPLEMENTED),
    (IntegrityError, grpc.StatusCode.DATA_LOSS),
)
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class SnapshotsService(stubs.SnapshotsServicer):
    """Called by gRPC's threads."""

    def __init__(
        self,
        snapshots: Snapshots,
        waiting: ThreadPoolExecutor,
        counters: Counters | None = None,
    ) -> None:
        """`waiting` runs the calls that may wait for a registry: however many do, the others are
        answered. Commit above all, which containerd makes inside its global transaction."""
        self._snapshots = snapshots
        self._counters = counters or Counters()
        for name in MAY_WAIT:
            call = partial(getattr(self, name))
            call.experimental_thread_pool = waiting  # type: ignore[attr-defined]
            setattr(self, name, call)

    def Prepare(self, request: Any, context: Any) -> Any:  # noqa: N802
        made = self._run(
            "Prepare",
            context,
            lambda s: s.prepare(request.key, request.parent, dict(request.labels)),
        )
        return messages.PrepareSnapshotResponse(mounts=_mounts(made))

    def View(self, request: Any, context: Any) -> Any:  # noqa: N802
        made = self._run(
            "View", context, lambda s: s.view(request.key, request.parent, dict(request.labels))
        )
        return messages.ViewSnapshotResponse(mounts=_mounts(made))

    def Mounts(self, request: Any, context: Any) -> Any:  # noqa: N802
        found = self._run("Mounts", context, lambda s: s.mounts(request.key))
        return messages.MountsResponse(mounts=_mounts(found))

    def Commit(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._run(
            "Commit",
            context,
            lambda s: s.commit(request.name, request.key, dict(request.labels), request.parent),
        )
        return empty_pb2.Empty()

    def Remove(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._run("Remove", context, lambda s: s.remove(request.key))
        return empty_pb2.Empty()

    def Stat(self, request: Any, context: Any) -> Any:  # noqa: N802
        row = self._run("Stat", context, lambda s: s.stat(request.key))
        return messages.StatSnapshotResponse(info=_info(row))

    def Update(self, request: Any, context: Any) -> Any:  # noqa: N802
        info, paths = request.info, tuple(request.update_mask.paths)
        row = self._run("Update", context, lambda s: s.update(info.name, dict(info.labels), paths))
        return messages.UpdateSnapshotResponse(info=_info(row))

    def List(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        rows = self._run("List", context, lambda s: s.list(tuple(request.filters)))
        for start in range(0, len(rows), LIST_BATCH):
            batch = rows[start : start + LIST_BATCH]
            yield messages.ListSnapshotsResponse(info=[_info(row) for row in batch])

    def Usage(self, request: Any, context: Any) -> Any:  # noqa: N802
        usage = self._run("Usage", context, lambda s: s.usage(request.key))
        return messages.UsageResponse(size=usage.size, inodes=usage.inodes)

    def Cleanup(self, request: Any, context: Any) -> Any:  # noqa: N802
        self._run("Cleanup", context, lambda s: s.cleanup())
        return empty_pb2.Empty()

    def _run(self, method: str, context: Any, call: Callable[[Snapshots], _Result]) -> _Result:
        """The call's result; what it raises ends the RPC with a status containerd understands."""
        began, code = time.monotonic(), grpc.StatusCode.OK
        try:
            return call(self._snapshots)
        except Exception as error:
            code = _code(error)
            if not isinstance(error, ImgsnapError | OSError):
                _log.exception("a defect")
            _fail(context, code, error)
        finally:
            self._counters.rpc(method, code.name, time.monotonic() - began)


def _fail(context: Any, code: grpc.StatusCode, error: Exception) -> NoReturn:
    hint = getattr(error, "hint", None)
    text = " ".join(str(error).split()) or type(error).__name__
    context.abort(code, f"{text} ({hint})" if hint else text)
    raise AssertionError("abort raises")


def _code(error: Exception) -> grpc.StatusCode:
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return grpc.StatusCode.RESOURCE_EXHAUSTED if full else grpc.StatusCode.INTERNAL
    if not isinstance(error, ImgsnapError):
        return grpc.StatusCode.INTERNAL
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.UNKNOWN


def _mounts(mounts: Iterable[Mount]) -> list[Any]:
    return [
        mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options)
        for mount in mounts
    ]


def _info(row: Row) -> Any:
    info = messages.Info(
        name=row.name, parent=row.parent, kind=row.kind.name, labels=dict(row.labels)
    )
    info.created_at.FromNanoseconds(row.created)
    info.updated_at.FromNanoseconds(row.updated)
    return info
