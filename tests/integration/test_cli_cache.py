"""imgsnap cache and du: sizes, quota, pins, pruning, checking."""

import pytest

from tests.support.cli import Cli
from tests.support.image_builder import image, write_layout
from tests.support.samples import base_tar, top_tar


@pytest.fixture
def app(cli: Cli, tmp_path) -> str:
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    write_layout(tmp_path / "next", image(base_tar(), top_tar(b"next")))
    cli.convert(f"oci:{tmp_path}/layout", "store:app:1")
    cli.convert(f"oci:{tmp_path}/next", "store:app:2")
    return "store:app:1"


def listed(cli: Cli) -> dict:
    found = cli("cache", "ls", "--format", "json").json["snapshots"]
    return {item["names"][0].rpartition(":")[2]: item for item in found}


def test_sizes_and_shares(cli: Cli, app: str):
    assert cli("cache", "du", "--format", "json").json["total"] == 0
    assert cli("cache", "ls").out.splitlines()[0].startswith("SNAPSHOT")
    cli("files", "store:app:2")
    assert listed(cli)["2"]["present"] < listed(cli)["2"]["size"]
    cli("warm", app, "--progress", "none")
    found = listed(cli)
    one, two = found["1"], found["2"]
    assert one["present"] == one["size"]
    assert one["shared"] == two["shared"] > 100_000
    du = cli("cache", "du", "--format", "json").json
    assert du["total"] == sum(du["kinds"].values()) and du["quota"] is None
    assert "100%" in cli("cache", "ls").out and "extents" in cli("cache", "du").out


def test_quota_prune_and_pins(cli: Cli, app: str):
    assert cli("cache", "quota").out == "none\n"
    assert cli("cache", "quota", "20GiB").out == "20.0 GiB\n"
    assert cli("cache", "quota").out == "20.0 GiB\n"
    assert cli("cache", "quota", env={"IMGSNAP_CACHE_QUOTA": "1MiB"}).out == "1.0 MiB\n"
    assert cli("--cache-quota", "none", "cache", "quota").out == "none\n"
    assert cli("cache", "quota", "none").out == "none\n"
    cli("warm", app, "--pin", "keeper", "--progress", "none")
    digest = cli("cache", "pin", "store:app:2").out.strip()
    assert listed(cli)["1"]["pins"] == ["keeper"] and listed(cli)["2"]["pins"] == ["user"]
    before = cli("cache", "du", "--format", "json").json["total"]
    told = cli("cache", "prune", "--all", "--dry-run", "--format", "json").json
    assert cli("cache", "du", "--format", "json").json["total"] == before
    done = cli("cache", "prune", "--all", "--format", "json").json
    assert done["removed"] == told["removed"] and done["used"] == before - done["freed"]
    assert cli("cache", "du", "--format", "json").json["kinds"]["tags"] == 0
    cli("cache", "unpin", digest)
    pins = cli("cache", "ls", "--format", "json").json["snapshots"]
    assert [item["pins"] for item in pins if item["digest"] == digest] == [[]]
    cli("cache", "prune", "--all")
    (kept,) = cli("cache", "ls", "--format", "json").json["snapshots"]
    cli("cache", "unpin", kept["digest"][7:19], "--name", "keeper")
    cli("cache", "prune", "--keep", "0")
    assert cli("cache", "du", "--format", "json").json["total"] == 0


def test_a_pinned_snapshot_needs_no_store(cli: Cli, app: str):
    cli("warm", app, "--pin", "keeper", "--progress", "none")
    (kept,) = cli("cache", "ls", "--format", "json").json["snapshots"]
    cli("cache", "prune", "--all")
    for blob in (cli.store / "blobs/sha256").iterdir():
        blob.unlink()
    place = f"store:app@{kept['digest']}"
    assert cli("cat", place, "/etc/hosts").out


def test_check_and_repair(cli: Cli, app: str):
    cli("warm", app, "--progress", "none")
    value = cli("cache", "check", "--format", "json").json
    assert value["findings"] == [] and value["chunks"] > 0
    data = max(cli.cache.glob("v1/extents/*/data"), key=lambda path: path.stat().st_blocks)
    with data.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    (blob, *_) = (cli.cache / "v1/blobs").iterdir()
    blob.write_bytes(blob.read_bytes() + b"x")
    for arguments in ((), ("--repair",)):
        result = cli.any("cache", "check", *arguments)
        assert result.code == 3
        assert result.out.count("damaged: ") == 2 and not result.err.startswith("error")
    assert cli("cache", "check").code == 0
    cli("warm", app, "--progress", "none")
    assert listed(cli)["1"]["present"] == listed(cli)["1"]["size"]
    assert len(list((cli.cache / "v1/quarantine").iterdir())) == 1


def test_du_of_a_store(cli: Cli, app: str):
    value = cli("du", app, "--format", "json").json
    assert value["shared"] > 0 and value["unique"] > 0
    assert value["total"] == value["unique"] + value["shared"]
    assert value["kinds"]["packs"]["shared"] > value["kinds"]["packs"]["unique"]
    assert "total" in cli("du", app).out
    blobs = (cli.store / "blobs/sha256").iterdir()
    other = cli("du", "store:app:2", "--format", "json").json
    stored = sum(path.stat().st_size for path in blobs)
    assert value["unique"] + other["unique"] + value["shared"] <= stored


def test_mistakes(cli: Cli, app: str):
    cli.fails(2, "cache", "quota", "much")
    cli.fails(2, "cache", "prune", "--all", "--keep", "1")
    cli.fails(2, "--cache-quota", "x", "cache", "du")
    cli.fails(4, "cache", "unpin", "abc")
    cli.fails(4, "cache", "pin", "store:none")
    cli.fails(4, "du", "store:none:1")
