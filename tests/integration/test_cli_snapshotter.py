"""`imgsnap snapshotter` as a user sees it."""

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.snapshots_client import SnapshotsClient
from tests.support.snapshotter import Snapshotter, running_snapshotter


@pytest.fixture
def running() -> Iterator[Snapshotter]:
    with (
        tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work,
        running_snapshotter(Path(work)) as snapshotter,
    ):
        client = SnapshotsClient(snapshotter.socket)
        client.prepare("extract")
        client.commit("layer", "extract", {"a": "b"})
        client.usage("layer")
        client.prepare("container", "layer")
        client.close()
        yield snapshotter


def test_look_beside_a_running_one(running: Snapshotter, cli: Cli):
    root = ("--root", str(running.root))
    listed = cli("snapshotter", "ls", *root, "--format", "json").json["snapshots"]
    found = [(row["name"], row["parent"], row["state"]) for row in listed]
    assert found == [("layer", None, "layer"), ("container", "layer", "active")]
    assert listed[0]["labels"] == {"a": "b"} and listed[0]["inodes"] == 1
    table = cli("snapshotter", "ls", *root).out.splitlines()
    assert table[0].split() == ["ID", "KIND", "STATE", "CREATED", "SIZE", "NAME", "PARENT"]
    assert len(table) == 3
    usage = cli("snapshotter", "usage", *root, "--format", "json").json["states"]
    assert usage["active"]["snapshots"] == 1 and usage["layer"]["inodes"] == 3
    assert "active" in cli("snapshotter", "usage", *root).out
    assert cli("snapshotter", "check", *root).out == "2 snapshots: 0 problems\n"


def test_check_finds_what_is_lost(running: Snapshotter, cli: Cli):
    lost = next(row for row in running.rows() if row.name == "container")
    shutil.rmtree(running.root / f"snapshots/{lost.id}")
    result = cli.any("snapshotter", "check", "--root", str(running.root))
    assert result.code == 3
    assert f"container: its directory snapshots/{lost.id} is missing" in result.out
    json = cli.any("snapshotter", "check", "--root", str(running.root), "--format", "json").json
    assert len(json["problems"]) == 1


def test_wrong_places(running: Snapshotter, cli: Cli, tmp_path: Path):
    for command in ("ls", "usage", "check"):
        cli.fails(4, "snapshotter", command, "--root", tmp_path / "nothing")
    address = ("--address", tmp_path / "s.sock")
    busy = cli.fails(10, "snapshotter", "run", "--root", running.root, *address)
    assert "another process serves" in busy
    cli.fails(2, "snapshotter", "run", "--root", tmp_path / "a:b", *address)
    cli.fails(2, "snapshotter", "run", "--root", "/proc/none", *address)
    long = ("--address", tmp_path / ("x" * 120))
    cli.fails(2, "snapshotter", "run", "--root", tmp_path / "state", *long)
    assert not (tmp_path / "s.sock").exists()


def test_it_ends_when_it_is_asked(running: Snapshotter):
    assert running.stop(signal.SIGTERM) == 0
    assert not running.socket.exists()
    assert not list(running.root.glob("*-wal")), "the ledger was closed"
    running.start()
    assert [row.name for row in running.rows()] == ["layer", "container"]
