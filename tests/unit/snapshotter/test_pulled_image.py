"""What containerd is told of an image that is pulled without its layers."""

import json

import pytest

from imgsnap.digest import Digest, chain_ids, sha256_digest
from imgsnap.errors import FormatError, ImgsnapError, InvalidArgument, LimitExceeded, NotFound
from imgsnap.oci.platforms import parse_platform
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.snapshotter import labels as names
from imgsnap.snapshotter.pulled_image import PulledImage, image_name, read_image

OCI = "application/vnd.oci.image."
LOCATION = RegistryLocation("registry.example", "team/app", "1")


class Documents:
    """Manifests and blobs by digest, as far as `read_image` asks."""

    name = "registry.example/team/app"

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.types: dict[str, str] = {}

    def add(self, kind: str, value: dict) -> dict:
        raw = json.dumps({"mediaType": OCI + kind, "schemaVersion": 2, **value}).encode()
        digest = sha256_digest(raw)
        self.data[digest], self.types[digest] = raw, OCI + kind
        return {"mediaType": OCI + kind, "digest": digest, "size": len(raw)}

    def manifest(self, reference: str) -> RawManifest:
        digest = Digest(self.data["tag"].decode() if reference == "1" else reference)
        raw = self.data[digest]
        return RawManifest(Descriptor(self.types[digest], digest, len(raw)), raw)

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        return self.data[descriptor.digest]


def digest(number: int) -> Digest:
    return sha256_digest(b"%d" % number)


def add_image(
    documents: Documents,
    count: int = 3,
    annotations: dict[str, str] | None = None,
    config_type: str = "config.v1+json",
    **config,
) -> dict:
    diff_ids = [digest(-n) for n in range(1, count + 1)]
    value = {"os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}, **config}
    layers = [
        {
            "mediaType": OCI + "layer.v1.tar",
            "digest": digest(n),
            "size": n,
            "annotations": annotations or {},
        }
        for n in range(count)
    ]
    entry = documents.add(config_type, value)
    return documents.add("manifest.v1+json", {"config": entry, "layers": layers})


def read(documents: Documents, top: dict, platform: str | None = None) -> PulledImage:
    documents.data["tag"] = top["digest"].encode()
    wanted = parse_platform(platform) if platform else None
    return read_image(documents, LOCATION, wanted)  # type: ignore[arg-type]


def test_labels_of_each_layer():
    documents = Documents()
    manifest = add_image(documents)
    image = read(documents, manifest)
    assert image.chain == tuple(chain_ids([digest(-1), digest(-2), digest(-3)]))
    for number in range(3):
        assert image.layer_labels(number) == {
            "containerd.io/snapshot.ref": image.chain[number],
            "containerd.io/snapshot/cri.image-ref": "registry.example/team/app:1",
            "containerd.io/snapshot/cri.manifest-digest": manifest["digest"],
            "containerd.io/snapshot/cri.layer-digest": digest(number),
            "containerd.io/snapshot/cri.image-layers": ",".join(map(digest, range(number, 3))),
        }


def test_an_author_adds_annotations_and_replaces_none_of_ours():
    documents = Documents()
    annotations = {
        names.SNAPSHOT_DIGEST: digest(9),
        names.IMAGE_REF: "registry.example/other",
        names.TARGET: digest(8),
        "org.example.other": "not for snapshotters",
    }
    labels = read(documents, add_image(documents, annotations=annotations)).layer_labels(0)
    assert labels[names.SNAPSHOT_DIGEST] == digest(9)
    assert labels[names.IMAGE_REF] == "registry.example/team/app:1"
    assert labels[names.TARGET] == digest(-1)
    assert "org.example.other" not in labels


def test_annotations_that_containerd_would_refuse():
    documents = Documents()
    image = read(documents, add_image(documents, annotations={names.PREFIX + "x": "y" * 4080}))
    with pytest.raises(LimitExceeded):
        image.layer_labels(0)


@pytest.mark.parametrize("count", [1, 55, 56, 57, 58, 400])
def test_the_list_of_layers_ends_at_a_whole_digest(count: int):
    documents = Documents()
    image = read(documents, add_image(documents, count))
    for number in (0, count - 1):
        listed = image.layer_labels(number)[names.IMAGE_LAYERS].split(",")
        assert listed == [digest(n) for n in range(number, number + len(listed))]
    assert len(image.layer_labels(0)[names.IMAGE_LAYERS].split(",")) == min(count, 56)


def test_content_keeps_what_it_refers_to():
    documents = Documents()
    manifest = add_image(documents)
    entry = {**manifest, "platform": {"os": "linux", "architecture": "s390x"}}
    index = documents.add("index.v1+json", {"manifests": [entry]})
    image = read(documents, index, "linux/s390x")
    config, written, top = image.contents("other")
    source = {"containerd.io/distribution.source.registry.example": "team/app"}
    assert config.data == image.config and config.digest == sha256_digest(config.data)
    assert config.labels == {"containerd.io/gc.ref.snapshot.other": image.chain[-1], **source}
    assert written.digest == manifest["digest"]
    children = {f"containerd.io/gc.ref.content.l.{n}": digest(n) for n in range(3)}
    children["containerd.io/gc.ref.content.config"] = config.digest
    assert written.labels == {**children, **source}
    assert top.digest == index["digest"] == image.target.digest
    assert top.labels == {"containerd.io/gc.ref.content.m.0": manifest["digest"], **source}


def test_what_cannot_be_pulled():
    documents = Documents()
    entry = add_image(documents)
    other = {**entry, "platform": {"os": "linux", "architecture": "s390x"}}
    index = documents.add("index.v1+json", {"manifests": [other]})
    nested = {**index, "platform": {"os": "linux", "architecture": "s390x"}}
    cases: list[tuple[dict, type[ImgsnapError]]] = [
        (index, NotFound),
        (documents.add("index.v1+json", {"manifests": []}), NotFound),
        (add_image(documents, config_type="other+json"), InvalidArgument),
        (add_image(documents, rootfs={"diff_ids": [digest(1)]}), FormatError),
        (add_image(documents, rootfs={"diff_ids": ["sha256:1", "x", 3]}), FormatError),
        (add_image(documents, rootfs=7), FormatError),
        (add_image(documents, 0), FormatError),
    ]
    for top, kind in cases:
        with pytest.raises(kind):
            read(documents, top, "linux/mips64le")
    with pytest.raises(ImgsnapError, match="index inside"):
        read(documents, documents.add("index.v1+json", {"manifests": [nested]}), "linux/s390x")


@pytest.mark.parametrize(
    ("tag", "pinned", "name"),
    [
        (None, None, "registry.example/team/app:latest"),
        ("2", None, "registry.example/team/app:2"),
        (None, digest(1), f"registry.example/team/app@{digest(1)}"),
        ("2", digest(1), f"registry.example/team/app:2@{digest(1)}"),
    ],
)
def test_names(tag: str | None, pinned: Digest | None, name: str):
    assert image_name(RegistryLocation("registry.example", "team/app", tag, pinned)) == name
