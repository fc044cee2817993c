"""A client of containerd's Snapshots service, and its mounts made real."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2 as messages
from imgsnap.containerd.api.services.snapshots.v1.snapshots_pb2_grpc import SnapshotsStub
from imgsnap.containerd.connection import connect
from imgsnap.snapshotter.mount_forms import Mount
from tests.support.mounts import MS_RDONLY, mount, unmount

MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 1 << 14
TIMEOUT_S = 60.0
KEPT = {"containerd.io/gc.root": "2026-01-01T00:00:00Z"}
"""Labels without which containerd's garbage collection takes a snapshot."""


@dataclass
class SnapshotsClient:
    """`snapshotter` and `namespace` matter to containerd only. All raise grpc.RpcError."""

    socket: Path
    snapshotter: str = ""
    namespace: str | None = None
    _channel: grpc.Channel = field(init=False)

    def __post_init__(self) -> None:
        self._channel = connect(self.socket, namespace=self.namespace, timeout=TIMEOUT_S)
        self._stub = SnapshotsStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, kind: str, **fields: object):
        request = getattr(messages, kind)(snapshotter=self.snapshotter, **fields)
        return getattr(self._stub, method)(request)

    def prepare(self, key: str, parent: str = "", labels: Mapping[str, str] = KEPT) -> list[Mount]:
        fields = {"key": key, "parent": parent, "labels": dict(labels)}
        return _mounts(self._call("Prepare", "PrepareSnapshotRequest", **fields))

    def view(self, key: str, parent: str = "", labels: Mapping[str, str] = KEPT) -> list[Mount]:
        fields = {"key": key, "parent": parent, "labels": dict(labels)}
        return _mounts(self._call("View", "ViewSnapshotRequest", **fields))

    def mounts(self, key: str) -> list[Mount]:
        return _mounts(self._call("Mounts", "MountsRequest", key=key))

    def commit(
        self, name: str, key: str, labels: Mapping[str, str] = KEPT, parent: str = ""
    ) -> None:
        fields = {"name": name, "key": key, "labels": dict(labels), "parent": parent}
        self._call("Commit", "CommitSnapshotRequest", **fields)

    def remove(self, key: str) -> None:
        self._call("Remove", "RemoveSnapshotRequest", key=key)

    def stat(self, key: str):
        return self._call("Stat", "StatSnapshotRequest", key=key).info

    def update(self, info, *paths: str):
        request = messages.UpdateSnapshotRequest(snapshotter=self.snapshotter, info=info)
        request.update_mask.paths.extend(paths)
        return self._stub.Update(request).info

    def list(self, *filters: str) -> list:
        answers = self._call("List", "ListSnapshotsRequest", filters=filters)
        return [info for answer in answers for info in answer.info]

    def usage(self, key: str) -> tuple[int, int]:
        found = self._call("Usage", "UsageRequest", key=key)
        return found.size, found.inodes

    def cleanup(self) -> None:
        self._call("Cleanup", "CleanupRequest")


def _mounts(answer) -> list[Mount]:
    return [Mount(one.type, one.source, tuple(one.options)) for one in answer.mounts]


@contextlib.contextmanager
def code(*expected: str) -> Iterator[None]:
    """The block must fail with one of these gRPC codes."""
    try:
        yield
    except grpc.RpcError as error:
        assert error.code().name in expected, error
    else:
        raise AssertionError(f"succeeded, expected {expected}")


@contextlib.contextmanager
def mounted(mounts: Sequence[Mount], target: Path | None = None) -> Iterator[Path]:
    """The mounts as containerd makes them, at `target` or a directory of its own."""
    with contextlib.ExitStack() as stack:
        if target is None:
            target = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        target.mkdir(exist_ok=True)
        for one in mounts:
            mount_one(one, target)
            stack.callback(unmount, target)
        yield target


def mount_one(one: Mount, target: Path) -> None:
    if one.type == "bind":
        mount(one.source, target, "bind", MS_BIND | MS_REC)
        if "ro" in one.options:
            mount("none", target, "bind", MS_BIND | MS_REMOUNT | MS_RDONLY)
        return
    assert one.type == "overlay", one
    lowers = next(o for o in one.options if o.startswith("lowerdir=")).partition("=")[2].split(":")
    others = [o for o in one.options if not o.startswith("lowerdir=")]
    common = os.path.commonpath(lowers) if len(lowers) > 1 else "/"
    short = [os.path.relpath(lower, common) for lower in lowers] if common != "/" else lowers
    before = os.getcwd()
    os.chdir(common)  # one page of options holds 128 layers only with short names
    try:
        mount("overlay", target, "overlay", 0, ",".join([*others, f"lowerdir={':'.join(short)}"]))
    finally:
        os.chdir(before)
