"""A complete snapshot is mounted from local files, and no process stays behind."""

import os
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.samples import base_tar, noise, program_tar, top_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"


@pytest.fixture
def app(cli: Cli, tmp_path) -> str:
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    cli("warm", "store:app", "--progress", "none")
    return "store:app"


def test_no_process_serves_it(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    cli("mount", app, where)
    assert cli.processes() == [] and len(cli.mounts()) == 0
    (listed,) = cli("mounts", "--format", "json").json["mounts"]
    assert listed["direct"] and listed["alive"] and listed["pid"] == 0
    assert "none needed" in cli("mounts").out
    assert (where / "lib/noise").read_bytes() == noise(300_000, 1)
    assert os.getxattr(where / "usr/text", "user.note") == b"\0\xff"
    cli.fails(7, "mount", app, where)
    cli("umount", where)
    assert not where.exists() and cli.leftovers() == []
    assert list((cli.cache / "v1/pins").iterdir()) == []


def test_eviction_leaves_a_mounted_one_alone(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    cli("mount", app, where)
    before = cli("cache", "du", "--format", "json").json["kinds"]["extents"]
    cli("cache", "prune", "--all")
    after = cli("cache", "du", "--format", "json").json["kinds"]["extents"]
    assert before == after > 0
    (listed,) = cli("cache", "ls", "--format", "json").json["snapshots"]
    assert listed["pins"][0].startswith("mount ")
    cli("umount", where)
    cli("cache", "prune", "--all")
    assert cli("cache", "du", "--format", "json").json["total"] == 0


def test_writable(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    cli("mount", app, where, "--rw")
    assert cli.processes() == []
    (where / "etc/hosts").write_text("changed")
    assert (where / "etc/hosts").read_text() == "changed"
    cli("umount", where)
    assert cli.leftovers() == []


def test_several_and_lazily(cli: Cli, app: str, tmp_path):
    places = [tmp_path / f"tree-{number}" for number in range(3)]
    for where in places:
        cli("mount", app, where)
    with (places[0] / "lib/noise").open("rb") as file:
        cli.fails(10, "umount", places[0])
        cli("umount", "--lazy", places[0])
        cli("cache", "prune", "--all")
        assert file.read() == noise(300_000, 1)
    cli("umount", "--all")
    assert cli.leftovers() == []


def test_run(cli: Cli, tmp_path):
    write_layout(tmp_path / "program", image(program_tar(), compression=""))
    cli.convert(f"oci:{tmp_path}/program", "store:program")
    cli("warm", "store:program", "--progress", "none")
    done = cli("run", "store:program", "--", "/bin/sh", "-c", "echo direct; echo x > /new")
    assert done.out == "direct\n"
    assert cli.leftovers() == []


def test_a_tag_that_has_moved_is_not_mounted_stale(cli: Cli, app: str, tmp_path):
    write_layout(tmp_path / "next", image(base_tar(), top_tar(b"next")))
    cli.convert(f"oci:{tmp_path}/next", "store:app", "--force")
    where = tmp_path / "tree"
    cli("mount", app, where)
    assert (where / "etc/hosts").read_text() == "replaced by next\n"
    cli("umount", where)


def test_while_the_registry_is_away(cli: Cli, own_registry: DockerRegistry, name: str, tmp_path):
    remote = own_registry.put(name, collect(image(base_tar(), top_tar())))
    snap = f"{own_registry.address}/{name}:snap"
    cli.convert(remote, snap, HTTP)
    cli("warm", HTTP, snap, "--progress", "none")
    digest = cli("cache", "ls", "--format", "json").json["snapshots"][0]["digest"]
    own_registry.stop()
    where = tmp_path / "tree"
    cli("mount", HTTP, f"{own_registry.address}/{name}@{digest}", where)
    assert cli.processes() == []
    assert (where / "usr/noise").read_bytes() == noise(300_000, 1)
    cli("umount", where)


def test_a_damaged_chunk_means_a_server(cli: Cli, app: str, tmp_path):
    data: Path = max(cli.cache.glob("v1/extents/*/data"), key=lambda path: path.stat().st_blocks)
    with data.open("r+b") as file:
        file.seek(10_000)
        file.write(b"damage")
    where = tmp_path / "tree"
    cli("mount", app, where)
    try:
        assert cli.processes()
        assert (where / "lib/noise").read_bytes() == noise(300_000, 1)
    finally:
        cli("umount", where)
