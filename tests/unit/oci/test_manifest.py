"""Manifests and indexes: what is read, what is refused, what is written."""

import base64
import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.digest import sha256_digest
from imgsnap.errors import FormatError, ImgsnapError, LimitExceeded, Unsupported
from imgsnap.oci import manifest, media_types
from imgsnap.oci.manifest import (
    ImageIndex,
    ImageManifest,
    document_bytes,
    parse_document,
    parse_index,
    parse_manifest,
    raw_manifest,
    referrer_descriptor,
)
from imgsnap.oci.repository import Descriptor, Platform

DIGEST = sha256_digest(b"x")
BLOB = {"mediaType": "application/octet-stream", "digest": DIGEST, "size": 7}
PARSED = Descriptor("application/octet-stream", DIGEST, 7)


def image(**changes):
    value = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": BLOB,
        "layers": [BLOB],
    }
    return {key: item for key, item in (value | changes).items() if item is not ...}


def index(**changes):
    value = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [BLOB]}
    return {key: item for key, item in (value | changes).items() if item is not ...}


def raw(value) -> bytes:
    return json.dumps(value).encode()


def test_reads_a_manifest_with_everything():
    value = image(
        subject=BLOB,
        artifactType="a/b",
        annotations={"k": "v"},
        layers=[BLOB | {"annotations": {"x": "y"}, "urls": ["http://nowhere"], "data": "eA=="}],
        unknown={"later": 1},
    )
    assert parse_manifest(raw(value)) == ImageManifest(
        config=PARSED,
        layers=(Descriptor(PARSED.media_type, DIGEST, 7, {"x": "y"}),),
        subject=PARSED,
        artifact_type="a/b",
        annotations={"k": "v"},
    )


def embedded(content: bytes, text: str | None = None) -> bytes:
    """What the descriptor's data is taken for."""
    entry = {
        "mediaType": "a/b",
        "digest": sha256_digest(content),
        "size": len(content),
        "data": base64.b64encode(content).decode() if text is None else text,
    }
    return parse_manifest(raw(image(config=entry))).config.data


def test_embedded_content_survives():
    assert embedded(b"content") == b"content"
    config = Descriptor("a/b", sha256_digest(b"content"), 7, data=b"content")
    document = ImageManifest(config=config, layers=())
    assert parse_manifest(document_bytes(document)) == document


@pytest.mark.parametrize("text", ["", "!!!!!!!!!!!!", "Y29udGVuZA==", "Y29udGVudA", "Y29udGVudAAA"])
def test_embedded_content_that_is_not_the_blob_counts_for_nothing(text):
    assert embedded(b"content", text) == b""


def test_much_embedded_content_is_left_to_its_blob():
    assert embedded(bytes(manifest.EMBEDDED_SIZE_MAX)) != b""
    assert embedded(bytes(manifest.EMBEDDED_SIZE_MAX + 1)) == b""


def test_reads_an_index_with_platforms():
    entry = BLOB | {"platform": {"os": "linux", "architecture": "arm", "variant": "v7", "x": []}}
    parsed = parse_index(raw(index(manifests=[entry], mediaType=media_types.DOCKER_INDEX)))
    assert parsed.manifests[0].platform == Platform("linux", "arm", "v7")
    assert parsed.media_type == media_types.DOCKER_INDEX


def test_docker_manifests_are_known_by_field_or_content_type():
    said = raw(image(mediaType=media_types.DOCKER_MANIFEST))
    assert parse_document(said).media_type == media_types.DOCKER_MANIFEST
    silent = raw(image(mediaType=...))
    with_type = parse_document(silent, media_type=media_types.DOCKER_MANIFEST + "; charset=utf-8")
    assert with_type.media_type == media_types.DOCKER_MANIFEST
    assert parse_document(silent).media_type == media_types.OCI_MANIFEST


def test_null_lists_are_empty_as_go_prints_them():
    assert parse_manifest(raw(image(layers=None, annotations=None, subject=None))).layers == ()
    assert parse_index(raw(index(manifests=None))).manifests == ()


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (image(schemaVersion=3), "schemaVersion"),
        (image(schemaVersion=...), "schemaVersion"),
        (image(config=...), "config"),
        (image(config=[]), "config"),
        (image(layers=...), "layers"),
        (image(layers={}), "layers"),
        (image(layers=[1]), "layers[0]"),
        (image(config=BLOB | {"digest": "sha256:zz"}), "config.digest"),
        (image(config=BLOB | {"digest": "../../etc/passwd"}), "config.digest"),
        (image(config=BLOB | {"digest": "sha512:" + "a" * 128}), "config.digest"),
        (image(config=BLOB | {"digest": None}), "config.digest"),
        (image(config=BLOB | {"size": -1}), "config.size"),
        (image(config=BLOB | {"size": 1.5}), "config.size"),
        (image(config=BLOB | {"size": True}), "config.size"),
        (image(config=BLOB | {"size": 1 << 63}), "config.size"),
        (image(config=BLOB | {"size": "7"}), "config.size"),
        (image(layers=[BLOB, BLOB | {"mediaType": ""}]), "layers[1].mediaType"),
        (image(annotations={"k": 1}), "annotations['k']"),
        (image(annotations=[]), "annotations"),
        (image(annotations={"k": "\ud800"}), "annotations"),
        (image(artifactType=5), "artifactType"),
        (image(subject="sha256:"), "subject"),
        (image(mediaType=1), "mediaType"),
        (image(manifests=[]), "manifests"),
        (index(mediaType=media_types.OCI_MANIFEST), "mediaType"),
        (image(mediaType=media_types.OCI_INDEX), "manifests"),
        (index(manifests=[BLOB | {"platform": {"os": "linux"}}]), "platform.architecture"),
        (index(manifests=[BLOB | {"platform": "linux"}]), "platform"),
        ({"schemaVersion": 2, "mediaType": "text/html"}, "mediaType"),
    ],
)
def test_refuses_and_names_the_field(value, field):
    with pytest.raises(FormatError) as caught:
        parse_document(raw(value))
    assert field in caught.value.field
    assert caught.value.offset == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schemaVersion":2,"schemaVersion":2}',
        b'{"schemaVersion":NaN}',
        b'{"schemaVersion":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000,
    ],
)
def test_refuses_what_is_no_json_object(data):
    with pytest.raises(FormatError):
        parse_document(data)


def test_limits_are_named(monkeypatch):
    monkeypatch.setattr(manifest, "LAYERS_MAX", 1)
    with pytest.raises(LimitExceeded) as caught:
        parse_document(raw(image(layers=[BLOB, BLOB])))
    assert caught.value.limit == "oci.layers_max"
    with pytest.raises(LimitExceeded):
        parse_document(raw(image(annotations={str(n): "" for n in range(1025)})))
    with pytest.raises(LimitExceeded):
        parse_document(raw(image(annotations={"k": "v" * 70_000})))
    with pytest.raises(LimitExceeded):
        parse_document(b" " * (17 << 20))


def test_schema_1_is_refused_with_a_hint():
    with pytest.raises(Unsupported) as caught:
        parse_document(raw({"schemaVersion": 1, "fsLayers": []}))
    assert caught.value.hint


def test_serialisation_is_canonical_and_read_back():
    document = ImageManifest(
        PARSED, (PARSED,), subject=PARSED, artifact_type="a/b", annotations={"z": "1", "a": "ü"}
    )
    data = document_bytes(document)
    assert data == json.dumps(
        json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8")
    assert parse_document(data) == document
    made = raw_manifest(document)
    assert made.raw == data
    assert made.descriptor.digest == sha256_digest(data)
    assert made.descriptor.artifact_type == "a/b"


def test_a_referrer_is_typed_by_its_config_when_it_names_no_type():
    entry = referrer_descriptor(b"{}", ImageManifest(PARSED, (), annotations={"a": "b"}))
    assert entry.artifact_type == PARSED.media_type
    assert entry.annotations == {"a": "b"}


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
_ANNOTATIONS = st.dictionaries(_TEXT, _TEXT, max_size=3)
_DESCRIPTORS = st.builds(
    Descriptor,
    media_type=_TEXT.filter(bool),
    digest=st.binary(min_size=32, max_size=32).map(lambda b: "sha256:" + b.hex()),
    size=st.integers(0, (1 << 63) - 1),
    annotations=_ANNOTATIONS,
    artifact_type=_TEXT,
    platform=st.none() | st.builds(Platform, _TEXT.filter(bool), _TEXT.filter(bool), _TEXT),
)
_LISTS = st.lists(_DESCRIPTORS, max_size=3).map(tuple)
_REST = {
    "subject": st.none() | _DESCRIPTORS,
    "artifact_type": _TEXT,
    "annotations": _ANNOTATIONS,
}


@given(
    st.builds(ImageManifest, config=_DESCRIPTORS, layers=_LISTS, **_REST)
    | st.builds(ImageIndex, manifests=_LISTS, **_REST)
)
def test_documents_round_trip(document):
    assert parse_document(document_bytes(document)) == document


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def _places(value, path=()):
    yield path
    if isinstance(value, dict):
        children = value.items()
    else:
        children = enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from _places(item, (*path, key))


@given(st.data())
def test_mutated_documents_raise_only_our_errors(data):
    value = json.loads(raw(data.draw(st.sampled_from([image(subject=BLOB), index()]))))
    path = data.draw(st.sampled_from(list(_places(value))[1:]))
    place = value
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = data.draw(_JSON)
    text = json.dumps(value).encode()
    cut = data.draw(st.integers(0, 3))
    with contextlib.suppress(ImgsnapError):
        parse_document(text[: len(text) - cut])


@given(st.binary(max_size=200))
def test_any_bytes_raise_only_our_errors(data):
    with pytest.raises(ImgsnapError):
        parse_document(data)
