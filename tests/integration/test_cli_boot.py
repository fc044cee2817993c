"""trace, optimize, and starts from boot packs, through the command line and a real registry."""

import json
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo.link import Link
from imgsnap.formats.trace import parse_trace
from perf.harness.recorder import Recorder
from tests.support.boot import damaged
from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import image, write_layout
from tests.support.samples import noise, program_tar
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"
RTT_S = 0.02


def extra_tar() -> bytes:
    """Files of which a start reads some, whole or in part."""
    return layer_tar(
        [
            Item(b"data/read", content=noise(900_000, 3)),
            Item(b"data/part", content=noise(2_000_000, 4)),
            Item(b"data/other", content=noise(3_000_000, 5)),
        ]
    )


SCRIPT = "cat /data/read | wc -c; dd if=/data/part bs=4096 skip=300 count=2 2>/dev/null | wc -c"
WROTE = ["900000", "8192"]


@pytest.fixture
def snapshot(cli: Cli, tmp_path: Path) -> Path:
    """A layout with an image whose command is the script."""
    run = {"Entrypoint": ["/bin/busybox", "sh", "-c"], "Cmd": [SCRIPT]}
    write_layout(tmp_path / "layout", image(program_tar(), extra_tar(), run=run))
    return tmp_path / "layout"


@pytest.fixture
def remote(cli: Cli, registry: DockerRegistry, name: str, snapshot: Path) -> str:
    reference = f"{registry.address}/{name}:snap"
    cli.convert(f"oci:{snapshot}", reference, HTTP)
    return reference


def record(cli: Cli, ref: str, where: Path, *command: str) -> Path:
    result = cli("trace", HTTP, ref, "-o", where, *(["--", *command] if command else []))
    assert f"{where}: " in result.err
    return where


def forget(cli: Cli) -> None:
    """What the node has of any snapshot."""
    for path in sorted((cli.cache / "v1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def ranges(registry: DockerRegistry) -> int:
    return sum(access.status == 206 for access in registry.accesses())


@contextmanager
def recorded_link(registry: DockerRegistry, ref: str):
    """The reference through a proxy, over a link with a round-trip time."""
    with Link(registry.port, 0.0, RTT_S) as link, Recorder(link.port) as recorder:
        yield recorder, ref.replace(registry.address, f"127.0.0.1:{recorder.port}")


def test_a_recorded_start_makes_three_round_trips_and_no_demand(
    cli: Cli, registry: DockerRegistry, remote: str, tmp_path: Path
) -> None:
    trace = record(cli, remote, tmp_path / "trace.json")
    value = cli("optimize", HTTP, remote, "--trace", trace, "--format", "json").json
    assert value["name"] == "busybox" and value["ignoredBlocks"] == 0
    touched = parse_trace(trace.read_bytes())
    assert value["blocks"] == touched.blocks
    # Not the whole of what was not read, and all of what was.
    assert 900_000 + 8192 < touched.blocks * 4096 < 900_000 + 2_200_000

    forget(cli)
    registry.accesses()
    with recorded_link(registry, remote) as (recorder, reference):
        assert cli("run", HTTP, reference).out.split() == WROTE
        counts = recorder.counts()
        lines = [exchange.line for exchange in recorder.exchanges]
    assert counts["sequential"] <= 3, lines
    assert ranges(registry) == 0
    packs = [line for line in lines if value["digest"] in line]
    assert len(packs) == 1
    assert counts["received"] < value["size"] + 100_000

    # Without the pack the same start asks for its chunks.
    forget(cli)
    registry.accesses()
    assert cli("run", HTTP, "--boot-pack", "none", remote).out.split() == WROTE
    assert ranges(registry) > 0


def test_a_mount_starts_from_the_pack_too(
    cli: Cli, registry: DockerRegistry, remote: str, tmp_path: Path
) -> None:
    trace = record(cli, remote, tmp_path / "trace.json")
    cli("optimize", HTTP, remote, "--trace", trace)
    forget(cli)
    registry.accesses()
    where = tmp_path / "tree"
    cli("mount", HTTP, remote, where)
    try:
        assert (where / "data/read").read_bytes() == noise(900_000, 3)
        assert ranges(registry) == 0
        assert (where / "data/other").read_bytes() == noise(3_000_000, 5)  # not in it
        assert ranges(registry) > 0
    finally:
        cli("umount", where)
    registry.accesses()
    digest = cli("inspect", HTTP, remote, "--format", "json").json["digest"]
    registry.accesses()
    assert cli("run", HTTP, f"{remote.rpartition(':')[0]}@{digest}").out.split() == WROTE
    assert ranges(registry) == 0


def test_packs_by_name(cli: Cli, registry: DockerRegistry, remote: str, tmp_path: Path) -> None:
    whole = record(cli, remote, tmp_path / "default.json")
    other = record(cli, remote, tmp_path / "cat.json", "cat /data/other >/dev/null")
    cli("optimize", HTTP, remote, "--trace", whole)
    first = cli("optimize", HTTP, remote, "--trace", whole, "--name", "other", "--format", "json")
    second = cli("optimize", HTTP, remote, "--trace", other, "--name", "other", "--format", "json")
    listed = cli("inspect", HTTP, remote, "--format", "json").json["bootPacks"]
    assert [(pack["name"], pack["default"]) for pack in listed] == [
        ("other", False),
        ("busybox", True),
    ]
    assert listed[0]["digest"] == second.json["digest"] != first.json["digest"]
    table = cli("inspect", HTTP, remote).out
    assert "busybox (default)" in table and "BOOT PACK" in table

    forget(cli)
    registry.accesses()
    cli("run", HTTP, "--boot-pack", "other", remote, "--", "cat /data/other >/dev/null")
    assert ranges(registry) == 0
    forget(cli)
    assert cli("run", HTTP, "--boot-pack", "nosuch", remote).out.split() == WROTE
    assert ranges(registry) > 0
    both = cli(
        *("optimize", HTTP, remote, "--trace", whole, "--trace", other, "--format", "json")
    ).json
    assert both["blocks"] > second.json["blocks"]


def test_a_spoilt_pack_only_costs_speed(
    cli: Cli, registry: DockerRegistry, remote: str, tmp_path: Path
) -> None:
    trace = record(cli, remote, tmp_path / "trace.json")
    value = cli("optimize", HTTP, remote, "--trace", trace, "--format", "json").json
    digest = value["digest"].removeprefix("sha256:")
    blob = registry.storage / f"docker/registry/v2/blobs/sha256/{digest[:2]}/{digest}/data"
    good = blob.read_bytes()
    for bad in (damaged(good, len(good) // 2), damaged(good, 200), damaged(good, 3)):
        blob.write_bytes(bad)
        forget(cli)
        assert cli("run", HTTP, remote).out.split() == WROTE
    blob.write_bytes(good)  # other tests' packs may have the same bytes
    assert ranges(registry) > 0


def test_a_local_store_and_copies(
    cli: Cli, registry: DockerRegistry, name: str, snapshot: Path, tmp_path: Path
) -> None:
    cli.convert(f"oci:{snapshot}", "store:app")
    trace = record(cli, "store:app", tmp_path / "trace.json")
    value = cli("optimize", "store:app", "--trace", trace, "--format", "json").json
    forget(cli)
    assert cli("run", "store:app").out.split() == WROTE
    assert (cli.cache / "v1/boot-packs" / value["digest"].removeprefix("sha256:")).exists()

    remote = f"{registry.address}/{name}:copy"
    cli("push", HTTP, "store:app", remote, "--progress", "none")
    assert (
        cli("inspect", HTTP, remote, "--format", "json").json["bootPacks"][0]["digest"]
        == (value["digest"])
    )
    forget(cli)
    registry.accesses()
    assert cli("run", HTTP, remote).out.split() == WROTE
    assert ranges(registry) == 0


def test_traces_of_commands_that_fail_and_that_never_end(
    cli: Cli, remote: str, tmp_path: Path
) -> None:
    where = tmp_path / "trace.json"
    result = cli.any("trace", HTTP, remote, "-o", where, "--", "cat /etc/passwd; exit 7")
    assert result.code == 7 and parse_trace(where.read_bytes()).blocks > 0
    where.unlink()
    began = time.monotonic()
    result = cli.any("trace", HTTP, remote, "-o", where, "--for", "2", "--", "exec sleep 600")
    assert result.code == 0 and time.monotonic() - began < 60
    assert parse_trace(where.read_bytes()).complete
    assert "passwd" not in where.read_text()


def test_bad_input(cli: Cli, remote: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("{}")
    cli.fails(3, "optimize", HTTP, remote, "--trace", trace, hint=False)
    empty = {"format": {"name": "imgsnap trace", "version": 1}, "complete": True}
    trace.write_text(json.dumps({**empty, "extents": ["ab" * 32], "touches": [[0, 1, 1]]}))
    cli.fails(2, "optimize", HTTP, remote, "--trace", trace)
    cli.fails(2, "optimize", HTTP, remote, "--trace", trace, "--name", "a b")
    cli.fails(2, "optimize", HTTP, remote)
    cli.fails(2, "run", HTTP, "--boot-pack", "a b", remote)
    cli.fails(2, "trace", HTTP, remote, "--for", "0")
