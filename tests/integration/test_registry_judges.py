"""The distribution's docker-registry as the other side, and skopeo as an outside judge."""

import json
import subprocess

import pytest

from imgsnap.errors import NotFound
from imgsnap.oci import media_types
from imgsnap.oci.archive import DockerArchiveRepository, OciArchiveRepository
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.manifest import ImageIndex, parse_manifest, raw_manifest
from imgsnap.oci.registry_referrers import fallback_tag
from imgsnap.oci.repository import Descriptor, Platform
from imgsnap.oci.transfer import copy_document
from tests.support.docker_registry import docker_registry
from tests.support.oci_images import artifact, descriptor_of, push_image, repository_at

pytestmark = pytest.mark.registry


@pytest.fixture(scope="module")
def host():
    with docker_registry() as address:
        yield address


@pytest.fixture
def layout(tmp_path):
    repository = LayoutRepository(tmp_path / "layout", create=True)
    yield repository
    repository.close()


def skopeo(*arguments, check=True):
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *map(str, arguments)], capture_output=True, timeout=120
    )
    if check and done.returncode:
        raise AssertionError(done.stderr.decode())
    return done


def copy(source, target, *flags):
    insecure = ["--src-tls-verify=false"] if source.startswith("docker:") else []
    if target.startswith("docker:"):
        insecure.append("--dest-tls-verify=false")
    return skopeo("copy", "-q", *flags, *insecure, source, target)


def test_everything_round_trips_through_the_registry(host, tmp_path, layout):
    repository = repository_at(host, "round/trip")
    assert repository.tags() == []
    image = push_image(repository, "v1", bytes(range(256)) * 4000)
    snapshot = artifact(repository, image)
    repository.put_manifest(snapshot, ["v1-imgsnap"], subject=image.descriptor.digest)
    assert repository.tags() == ["sha256-" + image.descriptor.digest[7:], "v1", "v1-imgsnap"]
    found = repository.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert [entry.digest for entry in found] == [snapshot.descriptor.digest]
    layer = parse_manifest(image.raw).layers[0]
    whole = repository.blob(layer, size_max=1 << 30)
    assert repository.read_range(layer, 1000, 4321) == whole[1000:5321]
    assert repository.read_range(layer, 0, layer.size) == whole
    assert not repository.has_blob(descriptor_of(b"absent"))
    other = repository_at(host, "other/place")
    assert other.mount_blob(layer, repository)
    assert other.has_blob(layer)
    assert not other.mount_blob(descriptor_of(b"absent"), repository)
    path = tmp_path / "big"
    path.write_bytes(bytes(5 << 20))
    big = descriptor_of(path.read_bytes())
    other.put_blob(big, path)
    assert other.blob(big, size_max=big.size) == path.read_bytes()
    with pytest.raises(NotFound):
        other.manifest("none")
    copy_document(repository, layout, "v1", "v1", tmp_path)
    assert layout.manifest("v1") == image
    repository.close()
    other.close()


def test_layout_to_registry_to_skopeo_and_back(host, tmp_path, layout):
    image = push_image(layout, "v1")
    repository = repository_at(host, "to/skopeo")
    copy_document(layout, repository, "v1", "v1", tmp_path)
    shown = json.loads(
        skopeo("inspect", "--tls-verify=false", f"docker://{host}/to/skopeo:v1").stdout
    )
    assert shown["Digest"] == image.descriptor.digest
    copy(f"docker://{host}/to/skopeo:v1", f"oci:{tmp_path}/back:v1", "--preserve-digests")
    back = LayoutRepository(tmp_path / "back")
    assert back.manifest("v1") == image
    layer = parse_manifest(image.raw).layers[0]
    assert back.blob(layer, size_max=1 << 20) == layout.blob(layer, size_max=1 << 20)
    back.close()
    repository.close()


def test_skopeo_carries_snapshot_artefacts_unchanged(host, tmp_path, layout):
    """Our config and layer media types, artifactType, subject and annotations all survive."""
    image = push_image(layout, "v1")
    snapshot = artifact(layout, image)
    layout.put_manifest(snapshot, ["snap"])
    copy(f"oci:{layout.path}:snap", f"docker://{host}/by/skopeo:snap", "--preserve-digests")
    repository = repository_at(host, "by/skopeo")
    assert repository.manifest("snap") == snapshot
    copy(f"docker://{host}/by/skopeo:snap", f"oci:{tmp_path}/back:snap", "--preserve-digests")
    back = LayoutRepository(tmp_path / "back")
    assert back.manifest("snap") == snapshot
    for layer in parse_manifest(snapshot.raw).layers:
        assert back.blob(layer, size_max=1 << 20) == layout.blob(layer, size_max=1 << 20)
    found = back.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert [entry.digest for entry in found] == [snapshot.descriptor.digest]
    raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{host}/by/skopeo:snap")
    assert raw.stdout == snapshot.raw
    back.close()
    repository.close()


def test_skopeo_into_our_layout_keeps_our_referrers(tmp_path, layout):
    """skopeo writes index.json anew, with its own idea of an entry."""
    image = push_image(layout, "v1")
    named, nameless = artifact(layout, image), artifact(layout, image, b"2")
    layout.put_manifest(named, ["snap"])
    layout.put_manifest(nameless)
    copy(f"oci:{layout.path}:v1", f"oci:{layout.path}:again")
    assert layout.tags() == ["again", "snap", "v1"]
    found = layout.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert {entry.digest for entry in found} == {
        named.descriptor.digest,
        nameless.descriptor.digest,
    }


def test_skopeo_copies_an_index_unless_its_entries_name_artifact_types(host, layout):
    """Old skopeo drops artifactType from an index's entries, which changes the digest."""
    image = push_image(layout, "v1")
    snapshot = artifact(layout, image)
    layout.put_manifest(snapshot)
    linux, unknown = Platform("linux", "amd64"), Platform("unknown", "unknown")
    entries = [
        Descriptor(item.descriptor.media_type, item.descriptor.digest, len(item.raw), platform=on)
        for item, on in ((image, linux), (snapshot, unknown))
    ]
    index = raw_manifest(
        ImageIndex(tuple(entries), artifact_type="a/b", annotations={"io.imgsnap.x": "y"})
    )
    layout.put_manifest(index, ["both"])
    target = f"docker://{host}/an/index:both"
    copy(f"oci:{layout.path}:both", target, "--all", "--preserve-digests")
    repository = repository_at(host, "an/index")
    assert repository.manifest("both") == index
    repository.close()


def test_skopeos_archives_are_read(tmp_path, layout):
    image = push_image(layout, "v1")
    copy(f"oci:{layout.path}:v1", f"oci-archive:{tmp_path}/o.tar:name", "--preserve-digests")
    archive = OciArchiveRepository(tmp_path / "o.tar")
    assert archive.manifest("name") == image
    archive.close()
    copy(f"oci:{layout.path}:v1", f"docker-archive:{tmp_path}/d.tar:app:1", "--format", "v2s2")
    saved = DockerArchiveRepository(tmp_path / "d.tar")
    layers = parse_manifest(saved.manifest("app:1").raw).layers
    assert [layer.digest for layer in layers] == [
        layer.digest for layer in parse_manifest(image.raw).layers
    ]
    saved.blob(layers[0], size_max=1 << 20)
    saved.close()


def test_a_fallback_list_copied_by_skopeo_is_understood(host, layout):
    repository = repository_at(host, "fall/back")
    image = push_image(repository, "v1")
    made = artifact(repository, image)
    repository.put_manifest(made, subject=image.descriptor.digest)
    tag = fallback_tag(image.descriptor.digest)
    copy(f"docker://{host}/fall/back:{tag}", f"docker://{host}/fall/copy:{tag}", "--all")
    copied = repository_at(host, "fall/copy")
    found = copied.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert [entry.digest for entry in found] == [made.descriptor.digest]
    repository.close()
    copied.close()


def test_the_registry_is_gone_afterwards():
    with docker_registry() as address:
        repository = repository_at(address)
        assert repository.tags() == []
        repository.close()
    from imgsnap.errors import Unavailable

    with pytest.raises(Unavailable):
        repository_at(address).tags()
