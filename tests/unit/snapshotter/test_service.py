"""What a client of the service sees of each error."""

import errno
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from imgsnap import errors
from imgsnap.snapshotter import serve
from imgsnap.snapshotter.rows import WrongState
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support.snapshots_client import SnapshotsClient, code
from tests.unit.snapshotter.conftest import Core


class Failing(Snapshots):
    """Every Stat and List ends with `error`."""

    error: Exception

    def stat(self, key: str):
        raise self.error

    def list(self, filters):
        raise self.error


@pytest.fixture
def failing(core: Core, root: Path) -> Iterator[tuple[Failing, SnapshotsClient]]:
    core.snapshots.__class__ = Failing
    server = serve.start_server(core.snapshots, root / "s.sock")
    client = SnapshotsClient(root / "s.sock")
    yield core.snapshots, client
    client.close()
    server.stop(0).wait()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.NotFound("x"), "NOT_FOUND"),
        (errors.AlreadyExists("x"), "ALREADY_EXISTS"),
        (errors.InvalidReference("x"), "INVALID_ARGUMENT"),
        (WrongState("x"), "FAILED_PRECONDITION"),
        (errors.Busy("x"), "FAILED_PRECONDITION"),
        (errors.Unavailable("x"), "UNAVAILABLE"),
        (errors.AccessDenied("x"), "PERMISSION_DENIED"),
        (errors.LimitExceeded("X", 2, 1, where="x"), "RESOURCE_EXHAUSTED"),
        (errors.Unsupported("x"), "UNIMPLEMENTED"),
        (errors.DigestMismatch("x", "a", "b"), "DATA_LOSS"),
        (errors.ImgsnapError("x"), "UNKNOWN"),
        (OSError(errno.ENOSPC, "x"), "RESOURCE_EXHAUSTED"),
        (OSError(errno.EIO, "x"), "INTERNAL"),
        (ZeroDivisionError("x"), "INTERNAL"),
    ],
)
def test_codes(failing: tuple[Failing, SnapshotsClient], error: Exception, expected: str):
    snapshots, client = failing
    snapshots.error = error
    with code(expected):
        client.stat("x")
    with code(expected):
        client.list()


def test_the_reason_and_the_hint_are_told(failing: tuple[Failing, SnapshotsClient]):
    snapshots, client = failing
    snapshots.error = errors.Unavailable("r.example\ndoes not answer", hint="ask its owner")
    with pytest.raises(grpc.RpcError) as raised:
        client.stat("x")
    assert raised.value.details() == "r.example does not answer (ask its owner)"
