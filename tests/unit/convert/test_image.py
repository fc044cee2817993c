"""The converted image: a stub that anybody can read, and the config but for its layers."""

import gzip
import io
import json
import tarfile

import pytest

from imgsnap.blockstore.snapshot_manifest import manifest_kind, stands_for
from imgsnap.convert.image import converted_config
from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.formats.stub_layer import ANNOTATION, MEDIA_TYPE, stub_layer
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageManifest, parse_manifest, raw_manifest
from imgsnap.oci.repository import Descriptor
from imgsnap.snapshotter import labels
from tests.support.oci_images import descriptor_of

SNAPSHOT = Digest("sha256:" + "5a" * 32)


def test_the_stub_is_a_tar_gz_that_says_what_it_is():
    stub = stub_layer(SNAPSHOT)
    tar = gzip.decompress(stub.blob)
    assert stub.digest == sha256_digest(stub.blob) and stub.diff_id == sha256_digest(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        (member,) = archive.getmembers()
        text = archive.extractfile(member).read().decode()
    assert (member.name, member.mode, member.uid, member.mtime) == ("imgsnap-stub.txt", 0o444, 0, 0)
    assert SNAPSHOT in text and len(tar) % 512 == 0


def test_the_stub_is_the_snapshots_alone_and_never_changes():
    assert stub_layer(SNAPSHOT) == stub_layer(SNAPSHOT)
    assert stub_layer(SNAPSHOT).diff_id != stub_layer(Digest("sha256:" + "5b" * 32)).diff_id
    # Published images depend on these bytes: another version of them is another media type.
    assert stub_layer(SNAPSHOT).diff_id == (
        "sha256:19e929b456e115e1e08d6033b194c8d2e1f5563fe83febc5a7ea4205f9da75b4"
    )
    assert stub_layer(SNAPSHOT).digest == (
        "sha256:792e105aa741aadfc02029d42adbc77ebefe032f021ea187551261d0ef222ad7"
    )


def test_the_snapshotter_reads_the_same_label():
    assert labels.SNAPSHOT_DIGEST == ANNOTATION


def test_the_config_is_kept_but_for_the_layers():
    config = {
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-01-02T03:04:05Z",
        "config": {"Env": ["A=ö"], "Cmd": ["x"], "User": "1:2", "Labels": {"a": "b"}},
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "1" * 64, "sha256:" + "2" * 64]},
        "history": [{"created_by": "a"}, {"created_by": "b", "empty_layer": True}, {"c": 1}],
        "x-own": [1.5, None],
    }
    made = json.loads(converted_config(json.dumps(config).encode(), Digest("sha256:d"), SNAPSHOT))
    assert made.pop("rootfs") == {"type": "layers", "diff_ids": ["sha256:d"]}
    history = made.pop("history")
    assert [step.get("empty_layer", False) for step in history] == [True, True, True, False]
    assert history[0]["created_by"] == "a" and SNAPSHOT in history[-1]["comment"]
    assert made == {key: config[key] for key in made} and len(made) == len(config) - 2


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": "\\ud800"}',
        b'{"a": 1e999}',
        b'{"history": [1]}',
        b'{"history": {"a": 1}}',
        b"[]",
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_configs_that_cannot_be_converted(raw: bytes):
    with pytest.raises(FormatError):
        converted_config(raw, Digest("sha256:d"), SNAPSHOT)


def image(*annotations: dict[str, str]) -> ImageManifest:
    layers = (Descriptor(MEDIA_TYPE, SNAPSHOT, 1, found) for found in annotations)
    return ImageManifest(descriptor_of(b"{}", media_types.OCI_CONFIG), tuple(layers))


def test_what_a_manifest_stands_for():
    converted = image({ANNOTATION: SNAPSHOT})
    assert stands_for(converted) == SNAPSHOT
    assert manifest_kind(raw_manifest(converted)) == (False, None, SNAPSHOT)
    assert stands_for(image({})) is None and stands_for(image()) is None
    assert stands_for(image({ANNOTATION: SNAPSHOT}, {})) is None, "a stub is the only layer"
    with pytest.raises(FormatError):
        stands_for(image({ANNOTATION: "/etc/passwd"}))


def test_a_converted_image_is_not_converted_again():
    from imgsnap.convert.limits import Limits
    from imgsnap.convert.source import select_images
    from tests.support.memory_repository import MemoryRepository

    repository = MemoryRepository()
    manifest = raw_manifest(image({ANNOTATION: SNAPSHOT}))
    repository.add_manifest(manifest, "latest")
    with pytest.raises(InvalidArgument, match="converted image"):
        select_images(repository, "latest", [], Limits())
    assert parse_manifest(manifest.raw).layers[0].annotations == {ANNOTATION: SNAPSHOT}
