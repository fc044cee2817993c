"""convert --as image: an ordinary image to everybody, and its snapshot to us."""

import json
import subprocess

import pytest

from imgsnap.digest import Digest
from imgsnap.formats.stub_layer import ANNOTATION, stub_layer
from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.samples import base_tar, top_tar

pytestmark = pytest.mark.registry
HTTP = "--plain-http"
AS_IMAGE = ("--as", "image")
RUN = {"Env": ["A=b"], "Cmd": ["/bin/x"], "User": "1000", "WorkingDir": "/w", "Labels": {"l": "1"}}


def skopeo(*arguments: object) -> bytes:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *map(str, arguments)], capture_output=True, timeout=120
    )
    assert not done.returncode, done.stderr.decode()
    return done.stdout


def raw(cli: Cli, ref: str) -> dict:
    return json.loads(cli.bytes_of("inspect", HTTP, "--raw", ref))


@pytest.fixture
def converted(cli: Cli, registry: DockerRegistry, name: str) -> str:
    remote = registry.put(name, collect(image(base_tar(), top_tar(), run=RUN), "1.0"))
    snap = f"{registry.address}/{name}:1.0-fast"
    cli("convert", HTTP, remote, snap, *AS_IMAGE, "--progress", "none")
    return snap


def test_the_image_and_its_snapshot(cli: Cli, converted: str):
    index = raw(cli, converted)
    runnable, behind = index["manifests"]
    assert runnable["platform"] == {"os": "linux", "architecture": "amd64"}
    assert behind["platform"] == {"os": "unknown", "architecture": "unknown"}
    repository = converted.rpartition(":")[0]
    manifest = raw(cli, f"{repository}@{runnable['digest']}")
    (layer,) = manifest["layers"]
    assert layer["annotations"] == {ANNOTATION: behind["digest"]}
    assert layer["digest"] == stub_layer(Digest(behind["digest"])).digest
    assert "artifactType" not in manifest and "subject" not in manifest
    # Whatever names the image shows, lists and reads the snapshot.
    for ref in (converted, f"{repository}@{runnable['digest']}"):
        assert cli("inspect", HTTP, ref, "--format", "json").json["digest"] == behind["digest"]
        assert cli("cat", HTTP, ref, "/etc/hosts").out == "replaced by top\n"
    (row,) = cli("ls", HTTP, repository, "--format", "json").json["snapshots"]
    assert (row["name"], row["form"], row["platform"]) == (converted, "image", "linux/amd64")
    assert row["stored"] > 300_000
    source = f"{repository}:1.0"
    assert cli("inspect", HTTP, source, "--format", "json").json["digest"] == behind["digest"]
    cli("check", HTTP, converted, "--source", source)
    assert "error" in cli.fails(2, "convert", HTTP, converted, "store:again")
    # By itself, as a tag that another tool made.
    alone = f"{repository}:alone"
    tls = ("--dest-tls-verify=false", "--src-tls-verify=false")
    skopeo("copy", *tls, f"docker://{repository}@{runnable['digest']}", f"docker://{alone}")
    assert cli("cat", HTTP, alone, "/etc/hosts").out == "replaced by top\n"
    out = cli("pull", HTTP, alone, "store:alone:1", "--progress", "none").out
    assert out == f"store:alone:1@{behind['digest']}\n"


def test_others_take_it_for_an_image(cli: Cli, converted: str, tmp_path):
    shown = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{converted}"))
    assert shown["Env"] == ["A=b"] and shown["Labels"] == {"l": "1"} and len(shown["Layers"]) == 1
    config = json.loads(
        skopeo("inspect", "--config", "--tls-verify=false", f"docker://{converted}")
    )
    assert config["config"] == RUN
    assert [step.get("empty_layer", False) for step in config["history"]] == [False]
    copy = ("copy", "--all", "--preserve-digests", "--src-tls-verify=false")
    skopeo(*copy, f"docker://{converted}", f"oci:{tmp_path}/copy:app")
    assert raw(cli, f"oci:{tmp_path}/copy:app") == raw(cli, converted)
    assert cli("cat", f"oci:{tmp_path}/copy:app", "/etc/hosts").out == "replaced by top\n"
    skopeo("copy", "--src-tls-verify=false", f"docker://{converted}", f"oci:{tmp_path}/one:app")
    done = subprocess.run(
        ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/one:app", f"{tmp_path}/bundle"],
        capture_output=True,
    )
    assert not done.returncode, done.stderr.decode()
    assert [path.name for path in (tmp_path / "bundle/rootfs").iterdir()] == ["imgsnap-stub.txt"]


@pytest.mark.root
def test_mounting_it_shows_the_snapshot(cli: Cli, converted: str, tmp_path):
    cli("mount", HTTP, converted, tmp_path / "tree")
    try:
        assert (tmp_path / "tree/etc/hosts").read_text() == "replaced by top\n"
    finally:
        cli("umount", tmp_path / "tree")


def test_the_same_bytes_in_every_place_and_nothing_done_twice(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    write_layout(tmp_path / "layout", [image(base_tar()), image(top_tar(), architecture="arm64")])
    source, all_of = f"oci:{tmp_path}/layout", ("--all-platforms", *AS_IMAGE)
    targets = ["store:app:1", f"oci:{tmp_path}/out:1", f"{registry.address}/{name}:1"]
    # top_tar links into a layer that is not there.
    cli.fails(3, "convert", source, targets[0], *all_of, "--progress", "none")
    write_layout(tmp_path / "layout", [image(base_tar()), image(base_tar(9), architecture="arm64")])
    assert len({cli.convert(source, target, HTTP, *all_of) for target in targets}) == 1
    entries = raw(cli, targets[0])["manifests"]
    assert [entry["platform"]["architecture"] for entry in entries] == [
        "amd64",
        "arm64",
        "unknown",
        "unknown",
    ]
    for target in targets:
        assert cli.report(source, target, HTTP, *all_of)["upToDate"]
        # The other form is another content of the tag, made from the same converted layers.
        report = cli.report(source, target, HTTP, "--all-platforms")
        assert all(layer["reused"] for image in report["images"] for layer in image["layers"])
    (row,) = cli("ls", "--format", "json").json["snapshots"]
    assert row["form"] == "index"


def test_gc_keeps_what_a_converted_image_needs(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    now = ("--grace", "0", "--format", "json")
    for place in (f"oci:{tmp_path}/out", f"{registry.address}/{name}"):
        cli.convert(f"oci:{tmp_path}/layout", f"{place}:app", HTTP, *AS_IMAGE)
        (runnable, _) = raw(cli, f"{place}:app")["manifests"]
        kept = cli("gc", HTTP, f"{place}:app", *now).json
        assert kept["deleted"] == []
        gone = cli("gc", HTTP, f"{place}:app", *now, "--keep-tag", "none").json
        assert {item["kind"] for item in gone["deleted"]} == {"index", "image", "snapshot", "layer"}
        cli.fails(4, "inspect", HTTP, "--raw", f"{place}@{runnable['digest']}", hint=False)


def test_an_image_is_never_replaced(cli: Cli, registry: DockerRegistry, name: str):
    remote = registry.put(name, collect(image(base_tar()), "1.0"))
    cli.fails(7, "convert", HTTP, remote, remote, *AS_IMAGE, "--progress", "none")
