"""What the suite runs against: ours, and containerd's own, so that the suite itself is checked.

`IMGSNAP_CONFORMANCE=SOCKET[,SNAPSHOTTER]` runs it against one other service instead.
"""

import os
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.containerd import Containerd, release, running_containerd
from tests.support.snapshots_client import SnapshotsClient
from tests.support.snapshotter import running_snapshotter

OURS, OURS_IN_CONTAINERD = "imgsnap", "containerd:imgsnap"
OTHER = os.environ.get("IMGSNAP_CONFORMANCE", "")
SERVICES = (
    [OTHER]
    if OTHER
    else [
        OURS,
        OURS_IN_CONTAINERD,
        "containerd:overlayfs",
        "containerd:native",
    ]
)


@dataclass(frozen=True)
class Suite:
    """One test's snapshotter, with nothing in it, and a directory to work in."""

    service: str
    client: SnapshotsClient
    work: Path

    @property
    def is_overlay(self) -> bool:
        return "native" not in self.service


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    with (
        tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work,
        running_snapshotter(Path(work)) as ours,
        running_containerd(release("1.6"), snapshotter=ours.socket) as running,
    ):
        yield running


@pytest.fixture(params=SERVICES)
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    """In a containerd namespace of its own. Not in a mount namespace: gRPC's threads share ours."""
    service: str = request.param
    with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as name:
        work = Path(name) / "work"
        work.mkdir()
        if service == OURS:
            with running_snapshotter(Path(name)) as ours:
                yield from _suite(service, ours.socket, "", work)
        elif service == OTHER:
            socket, _, snapshotter = OTHER.partition(",")
            yield from _suite(service, Path(socket), snapshotter, work)
        else:
            running = request.getfixturevalue("containerd")
            yield from _suite(service, running.socket, service.partition(":")[2], work)


def _suite(service: str, socket: Path, snapshotter: str, work: Path) -> Iterator[Suite]:
    client = SnapshotsClient(socket, snapshotter, namespace=f"suite-{uuid.uuid4().hex}")
    mask = os.umask(0)
    try:
        yield Suite(service, client, work)
        _remove_all(client)
    finally:
        os.umask(mask)
        client.close()


def _remove_all(client: SnapshotsClient) -> None:
    """Children first: the newest is nobody's parent."""
    left = client.list()
    parents = {info.parent for info in left}
    while left:
        leaves = [info for info in left if info.name not in parents]
        assert leaves, "every snapshot has a child"
        for info in leaves:
            client.remove(info.name)
        left = [info for info in left if info not in leaves]
        parents = {info.parent for info in left}
