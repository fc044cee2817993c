"""Snapshots with a dm-verity hash tree, judged by veritysetup; and those without, as ever."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.node import node_daemon
from tests.support.samples import base_tar, many_files, noise, top_tar
from tests.support.tars import Item, layer_tar
from tests.support.verity import BLOCK, naive_tree

pytestmark = pytest.mark.registry
HTTP = "--plain-http"
LARGE = 3_000_000


@pytest.fixture
def layout(tmp_path: Path) -> str:
    write_layout(tmp_path / "image", image(base_tar(LARGE), top_tar()))
    return f"oci:{tmp_path}/image"


def verity_of(cli: Cli, ref: str, *flags: object) -> dict:
    return cli("inspect", ref, "--format", "json", *flags).json["verity"]


def judged(device: Path, verity: dict, root_hash: str | None = None) -> bool:
    """Whether veritysetup, which computes and compares the whole tree, takes the device."""
    assert shutil.which("veritysetup"), "apt-get install cryptsetup-bin"
    command = ["veritysetup", "verify", f"--hash-offset={verity['hashOffset']}"]
    command += [str(device), str(device), root_hash or verity["rootHash"]]
    done = subprocess.run(command, capture_output=True, timeout=100, check=False)
    return done.returncode == 0


def blob(cli: Cli, digest: str) -> bytes:
    return (cli.store / "blobs/sha256" / digest.rpartition(":")[2]).read_bytes()


def hash_blobs(cli: Cli) -> list[Path]:
    """Where the layer artefacts' block hashes are, or were."""
    index = json.loads((cli.store / "index.json").read_text())
    return [
        cli.store / "blobs/sha256" / part["digest"].rpartition(":")[2]
        for entry in index["manifests"]
        for part in json.loads(blob(cli, entry["digest"])).get("layers", [])
        if part["mediaType"] == "application/vnd.imgsnap.block-hashes.v1"
    ]


@pytest.mark.root
def test_veritysetup_takes_an_attached_device(cli: Cli, layout: str, tmp_path: Path) -> None:
    digest = cli.convert(layout, "store:app", "--verity")
    verity = verity_of(cli, "store:app")
    assert cli("inspect", "store:app").out.count(verity["rootHash"]) == 1
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    verified = cli("verify", "store:app", "--policy", policy, "--format", "json").json
    assert verified["digest"].endswith(digest) and verified["rootHash"] == verity["rootHash"]
    with node_daemon(cli):
        device = Path(cli("attach", "store:app").out.strip())
        size = verity["hashOffset"] + verity["size"]
        assert device.stat().st_size >= size, "files for VMs are padded"
        assert judged(device, verity)
        assert not judged(device, verity, "00" * 32)
        copy = tmp_path / "copy"
        copy.write_bytes(device.read_bytes()[:size])
        stalls = cli("explain", digest, "--format", "json").json["stalls"]
        assert [stall for stall in stalls if "hash tree" in stall["paths"]], stalls
        cli("detach", device)
    assert judged(copy, verity)
    whole = copy.read_bytes()
    data = whole[: verity["hashOffset"]]
    assert len(data) == verity["dataBlocks"] * BLOCK
    uuid = bytes.fromhex(cli("inspect", "store:app", "--format", "json").json["uuid"])
    assert (whole[len(data) :], verity["rootHash"]) == naive_tree(data, uuid)
    for place in (1030, len(data) - 1, len(data) + BLOCK + 5):
        with copy.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 1]))
        assert not judged(copy, verity), place
        copy.write_bytes(whole)


def test_a_snapshot_without_is_what_it_was(cli: Cli, tmp_path: Path) -> None:
    """The config's digest is the snapshot's identity; this one is from before there were trees."""
    write_layout(tmp_path / "image", image(base_tar(), top_tar(), compression=""))
    digest = cli.convert(f"oci:{tmp_path}/image", "store:app")
    manifest = json.loads(blob(cli, digest))
    assert manifest["config"]["digest"] == (
        "sha256:c8767868b068aa629f4a48d896b0a93277223de34cd7ebf13c7ef6910c160c84"
    )
    assert [*manifest["annotations"]] == ["io.imgsnap.rules"]
    assert verity_of(cli, "store:app") is None
    assert "hash tree" not in cli("inspect", "store:app").out


def test_one_root_hash_however_it_was_made(cli: Cli, layout: str) -> None:
    """Layers converted now, converted before, or taken from another repository; any threads."""
    digests = {cli.convert(layout, "store:fresh", "--verity")}
    others = [Cli(cli.root / f"other-{n}") for n in range(3)]
    others[0].convert(layout, "store:app")
    for other, options in zip(others, ([], ["--jobs", 8], []), strict=True):
        digests.add(other.convert(layout, "store:app", "--verity", *options))
    reusing = Cli(cli.root / "reusing")
    reuse = ("--reuse", f"oci:{others[0].store}:app:latest")
    digests.add(reusing.convert(layout, "store:app", "--verity", *reuse))
    assert len(digests) == 1
    (digest,) = digests
    annotation = json.loads(blob(cli, digest))["annotations"]["io.imgsnap.verity.roothash"]
    assert annotation == verity_of(cli, "store:fresh")["rootHash"]


def test_layers_and_data_packs_are_those_without_a_tree(cli: Cli, layout: str) -> None:
    def found(ref: str) -> dict:
        return cli("inspect", ref, "--format", "json").json

    cli.convert(layout, "store:plain")
    cli.convert(layout, "store:sealed", "--verity")
    plain, sealed = found("store:plain"), found("store:sealed")
    for name in ("layers", "uuid", "metadata", "inodes", "source", "rules"):
        assert plain[name] == sealed[name]
    assert sealed["packs"][: len(plain["packs"])] == plain["packs"]
    (own,) = sealed["packs"][len(plain["packs"]) :]
    assert own["size"] == sealed["verity"]["stored"]
    assert sealed["deviceSize"] - plain["deviceSize"] == sealed["verity"]["size"]


def test_up_to_date_asks_for_the_tree_too(cli: Cli, layout: str) -> None:
    with_tree = ("convert", layout, "store:app", "--verity", "--progress", "none")
    without = ("convert", layout, "store:app", "--progress", "none")
    for arguments, current in ((without, False), (with_tree, False), (with_tree, True)):
        result = cli(*arguments)
        assert ("is up to date" in result.out) == current
        assert ("root hash" in result.out) == (arguments is with_tree and not current)
    assert "is up to date" not in cli(*without).out


def test_layers_converted_before_are_read_once(
    cli: Cli, registry: DockerRegistry, name: str
) -> None:
    """Each pack once. Then their hashes are kept with them: no pack is read for a third image."""

    def fetched() -> list[str]:
        return [a.path.rpartition("/")[2] for a in registry.accesses() if a.method == "GET"]

    base = [base_tar(LARGE), many_files()]
    source = registry.put(name, collect(image(*base, top_tar())))
    cli.convert(source, f"{registry.address}/{name}:plain", HTTP)
    found = cli("inspect", HTTP, f"{registry.address}/{name}:plain", "--format", "json").json
    packs = {pack["digest"] for pack in found["packs"]}
    registry.accesses()
    cli.convert(source, f"{registry.address}/{name}:sealed", HTTP, "--verity")
    assert sorted(path for path in fetched() if path in packs) == sorted(packs)
    cli.convert(source, f"{registry.address}/{name}:again", HTTP, "--verity")
    assert packs.isdisjoint(fetched())
    other = registry.put(name, collect(image(*base, top_tar(b"other")), "other"))
    registry.accesses()
    snap = f"{registry.address}/{name}:other-snap"
    cli.convert(other, snap, HTTP, "--verity")
    assert packs.isdisjoint(fetched())
    cli("check", HTTP, snap, "--source", other)
    elsewhere = f"{registry.address}/{name}-elsewhere:snap"
    cli.convert(other, elsewhere, HTTP, "--verity", "--reuse", snap)
    assert "block hashes" in cli("du", HTTP, snap, "--format", "json").json["kinds"]
    assert verity_of(cli, elsewhere, HTTP) == verity_of(cli, snap, HTTP)


def test_hashes_that_are_gone_elsewhere_are_made_anew(cli: Cli, layout: str) -> None:
    """Not by a conversion that wants none; packs that are gone would be an error."""
    digest = cli.convert(layout, "store:app", "--verity")
    for path in hash_blobs(cli):
        path.unlink()
    other = Cli(cli.root / "other")
    reuse = ("--reuse", f"oci:{cli.store}:app:latest")
    other.convert(layout, "store:app", *reuse)
    assert not hash_blobs(other)
    assert other.convert(layout, "store:sealed", "--verity", *reuse) == digest
    assert [path.exists() for path in hash_blobs(other)] == [True, True]


def test_more_layers_than_readers_take_are_refused_at_once(cli: Cli, tmp_path: Path) -> None:
    tars = [layer_tar([Item(b"f", content=b"1")])] * 1024
    write_layout(tmp_path / "image", image(*tars))
    target = (f"oci:{tmp_path}/image", "store:app", "--limit", "layers=2000")
    assert "1024 layers; a snapshot can have 1023" in cli.fails(8, "convert", *target, "--verity")
    cli.convert(*target)
    cli("check", "store:app")


def test_damaged_hashes_are_noticed(cli: Cli, layout: str) -> None:
    cli.convert(layout, "store:app", "--verity")
    path, _ = hash_blobs(cli)
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))
    assert path.name in cli.fails(
        3, "convert", layout, "store:app", "--verity", "--force", hint=False
    )
    path.unlink()
    cli.convert(layout, "store:app", "--verity", "--force")
    assert path.read_bytes() == content, "stored anew"
    cli("check", "store:app")


def test_check_computes_the_tree_anew(cli: Cli, layout: str) -> None:
    digest = cli.convert(layout, "store:app", "--verity")
    root_hash = verity_of(cli, "store:app")["rootHash"]
    assert cli("check", "store:app", "--format", "json").json["rootHash"] == root_hash
    assert root_hash in cli("check", "store:app", "--source", layout).out
    manifest = json.loads(blob(cli, digest))
    pack = manifest["layers"][-1]
    path = cli.store / "blobs/sha256" / pack["digest"].partition(":")[2]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert pack["digest"] in cli.fails(3, "check", "store:app", hint=False)


def test_the_rest_of_the_commands(cli: Cli, layout: str, tmp_path: Path) -> None:
    """gc, copies, the cache and images for containerd treat the tree as they do any extent."""
    first = cli.convert(layout, "store:app", "--verity")
    cli("pull", "store:app", "store:copied", "--progress", "none")
    assert cli("inspect", "store:copied", "--format", "json").json["digest"] == f"sha256:{first}"
    assert cli("gc", "store:any", "--grace", "0", "--format", "json").json["deleted"] == []
    cli("check", "store:app")
    cli("warm", "store:app", "--progress", "none")
    (cached,) = cli("cache", "ls", "--format", "json").json["snapshots"]
    device = cli("inspect", "store:app", "--format", "json").json["deviceSize"]
    assert cached["present"] == cached["size"] == device, cached
    cli("cache", "check")
    cli.convert(layout, "store:image", "--verity", "--as", "image")
    assert verity_of(cli, "store:image")["rootHash"] == verity_of(cli, "store:app")["rootHash"]
    assert "is up to date" in cli("convert", layout, "store:image", "--verity", "--as", "image").out


@pytest.mark.root
def test_a_complete_snapshot_is_mounted_directly(cli: Cli, layout: str, tmp_path: Path) -> None:
    cli.convert(layout, "store:app", "--verity")
    cli("warm", "store:app", "--progress", "none")
    where = tmp_path / "tree"
    cli("mount", "store:app", where)
    (listed,) = cli("mounts", "--format", "json").json["mounts"]
    assert listed["direct"]
    assert (where / "usr/noise").read_bytes() == noise(LARGE, 1)
    cli("umount", where)


def test_an_older_reader_refuses(cli: Cli, layout: str) -> None:
    digest = cli.convert(layout, "store:app", "--verity")
    config = json.loads(blob(cli, json.loads(blob(cli, digest))["config"]["digest"]))
    assert config["format"]["incompat"] == ["verity"]
