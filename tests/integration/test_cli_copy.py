"""push, pull, skopeo and ls: snapshots move between places with their bytes unchanged."""

import hashlib
import json
import subprocess

import pytest

from imgsnap.oci.media_types import ARTIFACT_SNAPSHOT, OCI_MANIFEST
from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.samples import base_tar, top_tar

pytestmark = pytest.mark.registry
HTTP = "--plain-http"


def digest_of(cli: Cli, ref: str) -> str:
    return cli("inspect", HTTP, "--format", "json", ref).json["digest"]


def skopeo(*arguments: str) -> None:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", "copy", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_push_and_pull_keep_the_digest(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    source = write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    digest = "sha256:" + cli.convert(f"oci:{tmp_path}/layout", "store:app:1.0")
    remote = f"{registry.address}/{name}:1.0-imgsnap"
    out = cli("push", HTTP, "store:app:1.0", remote, "--progress", "none").out
    assert out == f"{remote}@{digest}\n"
    assert digest_of(cli, remote) == digest

    registry.accesses()
    cli("push", HTTP, "store:app:1.0", remote, "--progress", "none")
    assert not [a for a in registry.accesses() if a.method in ("POST", "PATCH")]

    other = Cli(cli.root / "other")
    out = other("pull", HTTP, remote).out
    assert out.startswith(f"store:{name}:1.0-imgsnap@{digest}")
    assert digest_of(other, f"store:{name}:1.0-imgsnap") == digest
    other("pull", HTTP, remote, "store:named:2", "--progress", "plain")
    listed = other("ls", "--format", "json").json["snapshots"]
    assert {row["name"] for row in listed} == {f"store:{name}:1.0-imgsnap", "store:named:2"}
    assert {row["digest"] for row in listed} == {digest}
    assert other("ls", "-q").out.split() == sorted(row["name"] for row in listed)
    checked = other("check", "store:named:2", "--format", "json").json
    assert checked["digest"] == digest and checked["packs"] == 2
    # Both ways the copy is still found from its image.
    image_ref = f"{registry.address}/{name}@{source}"
    registry.put(name, collect(image(base_tar(), top_tar())))
    assert digest_of(cli, image_ref) == digest


def test_pull_by_the_image_takes_its_snapshot(cli: Cli, registry: DockerRegistry, name: str):
    remote = registry.put(name, collect(image(base_tar()), "1.0"))
    digest = cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    out = cli("pull", HTTP, remote, "store:mine:1", "--progress", "none").out
    assert out == f"store:mine:1@sha256:{digest}\n"


def test_push_and_pull_an_index(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    images = [image(base_tar()), image(top_base(), architecture="arm64")]
    write_layout(tmp_path / "layout", images)
    cli.convert(f"oci:{tmp_path}/layout", "store:multi:1", "--all-platforms")
    before = cli.bytes_of("inspect", "--raw", "store:multi:1")
    remote = f"{registry.address}/{name}:1"
    cli("push", HTTP, "store:multi:1", remote, "--progress", "none")
    assert cli.bytes_of("inspect", HTTP, "--raw", remote) == before
    (row,) = cli("ls", HTTP, f"{registry.address}/{name}", "--format", "json").json["snapshots"]
    assert row["name"] == f"{registry.address}/{name}:1"
    assert row["platform"] == "linux/amd64,linux/arm64"
    other = Cli(cli.root / "other")
    other("pull", HTTP, remote, "store:multi:1", "--progress", "none")
    assert other.bytes_of("inspect", "--raw", "store:multi:1") == before
    listed = other("files", "store:multi:1", "srv", "--platform", "linux/arm64").out
    assert listed == "arm\n"


def top_base() -> bytes:
    from tests.support.tars import Item, layer_tar

    return layer_tar([Item(b"srv/arm", content=b"arm")])


@pytest.mark.root
def test_skopeo_copies_a_snapshot_both_ways(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    layout = f"oci:{tmp_path}/made:snap"
    digest = "sha256:" + cli.convert(f"oci:{tmp_path}/layout", layout)
    remote = f"{registry.address}/{name}:snap"
    tls = ("--preserve-digests", "--dest-tls-verify=false", "--src-tls-verify=false")
    skopeo(*tls, layout, f"docker://{remote}")
    assert digest_of(cli, remote) == digest
    skopeo(*tls, f"docker://{remote}", f"oci:{tmp_path}/back:snap")
    assert digest_of(cli, f"oci:{tmp_path}/back:snap") == digest
    for number, ref in enumerate((remote, f"oci:{tmp_path}/back:snap")):
        place = Cli(cli.root / f"place-{number}")
        where = tmp_path / f"mounted-{number}"
        place("mount", HTTP, ref, where)
        try:
            assert (where / "etc/hosts").read_text() == "replaced by top\n"
            assert (where / "usr/noise").stat().st_size == 300_000
            assert len((where / "usr/noise").read_bytes()) == 300_000
        finally:
            place("umount", where)
        assert place.leftovers() == []


def test_ls_knows_snapshots_from_other_things(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    assert cli("ls", "--format", "json").json["snapshots"] == []
    assert cli("ls").out.split() == ["NAME", "DIGEST", "FORM", "PLATFORM", "STORED"]
    remote = registry.put(name, collect(image(base_tar()), "image"))
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    out = cli("ls", HTTP, "-q", f"{registry.address}/{name}").out
    assert out == f"{registry.address}/{name}:snap\n"
    cli.convert(remote, f"oci:{tmp_path}/out:a", HTTP)
    assert cli("ls", "-q", f"oci:{tmp_path}/out").out == f"oci:{tmp_path}/out:a\n"


def test_what_cannot_be_copied(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    remote = registry.put(name, collect(image(base_tar()), "image"))
    err = cli.fails(4, "pull", HTTP, remote, "store:x")
    assert "neither a snapshot nor an image that has one" in err
    cli.fails(4, "pull", HTTP, f"{registry.address}/{name}:none", "store:x")
    cli.fails(2, "pull", HTTP, f"{registry.address}/{name}@sha256:{'0' * 64}")
    cli.fails(4, "push", HTTP, "store:none", f"{remote}-snap")
    write_layout(tmp_path / "layout", image(base_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    cli.fails(2, "push", "store:app", f"oci-archive:{tmp_path}/file.tar")
    before = json.loads(cli.bytes_of("inspect", HTTP, "--raw", remote))
    cli.fails(7, "push", HTTP, "store:app", remote)
    assert json.loads(cli.bytes_of("inspect", HTTP, "--raw", remote)) == before
    assert cli("ls", "-q").out == "store:app:latest\n"


def test_oras_reads_what_we_publish(cli: Cli, registry: DockerRegistry, name: str):
    """An independent OCI client finds the artefact's manifest and blobs as the spec has them."""
    from oras.provider import Registry

    remote = registry.put(name, collect(image(base_tar()), "1.0"))
    snap = f"{registry.address}/{name}:snap"
    cli.convert(remote, snap, HTTP)
    client = Registry(insecure=True)
    manifest = client.get_manifest(snap, allowed_media_type=[OCI_MANIFEST])
    assert manifest["artifactType"] == ARTIFACT_SNAPSHOT
    assert manifest["subject"]["mediaType"] == OCI_MANIFEST
    for blob in [manifest["config"], *manifest["layers"]]:
        content = client.get_blob(snap, blob["digest"]).content
        assert "sha256:" + hashlib.sha256(content).hexdigest() == blob["digest"]
        assert len(content) == blob["size"]
