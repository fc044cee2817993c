"""Image manifests and indexes: JSON bytes to values and back.

Input is hostile: unknown fields are ignored, everything that is read is checked, counts are
bounded, and a document that two parsers could read in two ways is refused. The exact bytes that
were parsed are kept by the caller (`RawManifest`); what is written here is canonical: sorted
keys, no spaces, UTF-8.

Raises FormatError (field path in `field`, offset 0), LimitExceeded, or Unsupported for Docker's
schema 1. Specification: image-spec 1.1, manifest.md, image-index.md and descriptor.md.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from imgsnap.digest import Digest, parse_digest, sha256_digest
from imgsnap.errors import FormatError, InvalidArgument, LimitExceeded, Unsupported
from imgsnap.oci import media_types
from imgsnap.oci.repository import MANIFEST_SIZE_MAX, Descriptor, Platform, RawManifest

LAYERS_MAX = 4096
"""Layers of one manifest. Runtimes stop at 127; snapshots of ours list a few blobs per layer."""
INDEX_ENTRIES_MAX = 65_536
"""Entries of one index: what 16 MiB of index.json can hold at 256 bytes each."""
ANNOTATIONS_MAX = 1024
"""Annotations of one object."""
EMBEDDED_SIZE_MAX = 64 << 10
"""Bytes of content that a descriptor may embed; what is larger is left to its blob."""
TEXT_LENGTH_MAX = 64 << 10
"""Characters of one annotation value; annotations can carry small JSON documents."""
MEDIA_TYPE_LENGTH_MAX = 255
"""RFC 6838, section 4.2: 127 + '/' + 127."""
SIZE_LIMIT = 1 << 63
"""Sizes are signed 64-bit numbers in every other implementation."""


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """An image or artifact manifest, OCI or Docker schema 2."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    media_type: str = media_types.OCI_MANIFEST

    @property
    def effective_artifact_type(self) -> str:
        """`artifact_type`, else the config's media type (distribution-spec, listing referrers)."""
        return self.artifact_type or self.config.media_type


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """An image index or Docker manifest list."""

    manifests: tuple[Descriptor, ...]
    subject: Descriptor | None = None
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    media_type: str = media_types.OCI_INDEX

    @property
    def effective_artifact_type(self) -> str:
        """The artifact type by which referrers are filtered; an index has no config to lend one."""
        return self.artifact_type


Document = ImageManifest | ImageIndex


def parse_document(raw: bytes, *, media_type: str = "", record: str = "manifest") -> Document:
    """The manifest or index in `raw`; `media_type` is what the carrier said, if anything.

    `record` names the document in messages.
    """
    value = parse_json_object(raw, record=record)
    said = _text(value, "mediaType", record, length_max=MEDIA_TYPE_LENGTH_MAX)
    kind = said or media_type.partition(";")[0].strip().lower()
    version = value.get("schemaVersion")
    if kind in media_types.DOCKER_SCHEMA1 or version == 1:
        raise Unsupported(
            f"{record}: Docker schema 1 manifests are not supported",
            hint="push the image again with a current Docker; schema 1 ended in 2019",
        )
    if version != 2 or isinstance(version, bool):
        _fail(record, "schemaVersion", f"is {str(version)[:40]!r}, not 2")
    # CVE-2021-41190: a document that is both is one thing to one tool and another to the next.
    if "manifests" in value and ("layers" in value or "config" in value):
        _fail(record, "manifests", "stands beside the fields of an image manifest")
    if "manifests" in value:
        return _index(value, kind, record)
    return _manifest(value, kind, record)


def parse_manifest(raw: bytes, *, media_type: str = "", record: str = "manifest") -> ImageManifest:
    """Like parse_document, for a place where only an image manifest makes sense."""
    document = parse_document(raw, media_type=media_type, record=record)
    if not isinstance(document, ImageManifest):
        _fail(record, "manifests", "is there: an index where an image manifest was expected")
    return document


def parse_index(raw: bytes, *, media_type: str = "", record: str = "index") -> ImageIndex:
    """Like parse_document, for a place where only an index makes sense."""
    document = parse_document(raw, media_type=media_type, record=record)
    if not isinstance(document, ImageIndex):
        _fail(record, "manifests", "is missing: an image manifest where an index was expected")
    return document


def parse_json_object(raw: bytes, *, record: str, size_max: int = 16 << 20) -> dict[str, Any]:
    """A JSON object whose members are distinct; the base of every parser of this room."""
    if len(raw) > size_max:
        raise LimitExceeded("oci.json_size_max", len(raw), size_max, where=record)
    try:
        value = json.loads(raw, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        # UnicodeDecodeError, JSONDecodeError and over-long integers are all ValueErrors.
        raise FormatError(record, "document", 0, f"is not JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        _fail(record, "document", "is not a JSON object")
    return value


def parse_descriptor(value: object, *, record: str, where: str = "descriptor") -> Descriptor:
    """A content descriptor from decoded JSON; `where` is its field path."""
    fields = _object(value, record, where)
    return Descriptor(
        media_type=_media_type(fields, record, where),
        digest=_digest(fields, record, where),
        size=_size(fields, record, where),
        annotations=_annotations(fields, record, where),
        artifact_type=_text(fields, "artifactType", record, where, MEDIA_TYPE_LENGTH_MAX),
        platform=_platform(fields.get("platform"), record, f"{where}.platform"),
        data=_data(fields),
    )


def descriptor_to_json(descriptor: Descriptor) -> dict[str, Any]:
    """The descriptor as JSON values; empty optional fields are left out."""
    value: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": str(descriptor.digest),
        "size": descriptor.size,
    }
    if descriptor.artifact_type:
        value["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        value["annotations"] = dict(descriptor.annotations)
    if descriptor.platform is not None:
        platform = {"os": descriptor.platform.os, "architecture": descriptor.platform.architecture}
        if descriptor.platform.variant:
            platform["variant"] = descriptor.platform.variant
        value["platform"] = platform
    if descriptor.data:
        value["data"] = base64.b64encode(descriptor.data).decode()
    return value


def canonical_json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def document_bytes(document: Document) -> bytes:
    """The canonical bytes of a manifest or index."""
    value: dict[str, Any] = {"schemaVersion": 2, "mediaType": document.media_type}
    if isinstance(document, ImageManifest):
        value["config"] = descriptor_to_json(document.config)
        value["layers"] = [descriptor_to_json(layer) for layer in document.layers]
    else:
        value["manifests"] = [descriptor_to_json(entry) for entry in document.manifests]
    if document.subject is not None:
        value["subject"] = descriptor_to_json(document.subject)
    if document.artifact_type:
        value["artifactType"] = document.artifact_type
    if document.annotations:
        value["annotations"] = dict(document.annotations)
    return canonical_json(value)


def raw_manifest(document: Document) -> RawManifest:
    """The canonical bytes with their descriptor.

    Raises LimitExceeded when registries would not take a document of this size.
    """
    raw = document_bytes(document)
    if len(raw) > MANIFEST_SIZE_MAX:
        raise LimitExceeded("oci.manifest_size_max", len(raw), MANIFEST_SIZE_MAX, where="manifest")
    if parse_document(raw) != document:
        raise AssertionError("a manifest does not survive its own serialisation")
    return RawManifest(describe(raw, document), raw)


def describe(raw: bytes, document: Document) -> Descriptor:
    """The descriptor of a document whose exact bytes are `raw`."""
    return Descriptor(
        media_type=document.media_type,
        digest=sha256_digest(raw),
        size=len(raw),
        artifact_type=document.artifact_type,
    )


def referrer_descriptor(raw: bytes, document: Document) -> Descriptor:
    """The entry for this document in a list of referrers: artifact type and annotations copied.

    distribution-spec 1.1, "Pushing Manifests with Subject".
    """
    return Descriptor(
        media_type=document.media_type,
        digest=sha256_digest(raw),
        size=len(raw),
        annotations=dict(document.annotations),
        artifact_type=document.effective_artifact_type,
    )


def _manifest(value: dict[str, Any], kind: str, record: str) -> ImageManifest:
    if kind and kind not in media_types.MANIFESTS and "config" not in value:
        _fail(record, "mediaType", f"is {kind!r}, not a manifest's or an index's")
    if kind in media_types.INDEXES:
        _fail(record, "manifests", "is missing from an index")
    layers = _list(value, "layers", record, "layers_max", LAYERS_MAX)
    return ImageManifest(
        config=parse_descriptor(value.get("config"), record=record, where="config"),
        layers=tuple(
            parse_descriptor(layer, record=record, where=f"layers[{number}]")
            for number, layer in enumerate(layers)
        ),
        subject=_subject(value, record),
        artifact_type=_text(value, "artifactType", record, length_max=MEDIA_TYPE_LENGTH_MAX),
        annotations=_annotations(value, record, ""),
        media_type=kind if kind in media_types.MANIFESTS else media_types.OCI_MANIFEST,
    )


def _index(value: dict[str, Any], kind: str, record: str) -> ImageIndex:
    if kind in media_types.MANIFESTS:
        _fail(record, "mediaType", f"is {kind!r}, but the document is an index")
    entries = _list(value, "manifests", record, "index_entries_max", INDEX_ENTRIES_MAX)
    return ImageIndex(
        manifests=tuple(
            parse_descriptor(entry, record=record, where=f"manifests[{number}]")
            for number, entry in enumerate(entries)
        ),
        subject=_subject(value, record),
        artifact_type=_text(value, "artifactType", record, length_max=MEDIA_TYPE_LENGTH_MAX),
        annotations=_annotations(value, record, ""),
        media_type=kind if kind in media_types.INDEXES else media_types.OCI_INDEX,
    )


def _fail(record: str, name: str, problem: str) -> NoReturn:
    raise FormatError(record, name, 0, problem)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a member name appears twice in one object")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _object(value: object, record: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(record, where, "is missing" if value is None else "is not an object")
    return value


def _list(value: dict[str, Any], name: str, record: str, limit: str, maximum: int) -> list[Any]:
    """A required list; null counts as empty, because Go programs print empty slices so."""
    if name not in value:
        _fail(record, name, "is missing")
    items = value[name]
    if items is None:
        return []
    if not isinstance(items, list):
        _fail(record, name, "is not a list")
    if len(items) > maximum:
        raise LimitExceeded(f"oci.{limit}", len(items), maximum, where=f"{record}: {name}")
    return items


def _text(
    value: dict[str, Any],
    name: str,
    record: str,
    where: str = "",
    length_max: int = TEXT_LENGTH_MAX,
) -> str:
    """An optional string; "" when absent."""
    text = value.get(name)
    if text is None:
        return ""
    path = f"{where}.{name}" if where else name
    if not isinstance(text, str):
        _fail(record, path, "is not a string")
    _check_text(text, record, path, length_max)
    return text


def _check_text(text: str, record: str, path: str, length_max: int) -> None:
    if len(text) > length_max:
        raise LimitExceeded("oci.text_length_max", len(text), length_max, where=f"{record}: {path}")
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no UTF-8 writer can print back.
        _fail(record, path, "holds half a surrogate pair")


def _media_type(fields: dict[str, Any], record: str, where: str) -> str:
    text = _text(fields, "mediaType", record, where, MEDIA_TYPE_LENGTH_MAX)
    if not text:
        _fail(record, f"{where}.mediaType", "is missing")
    return text


def _digest(fields: dict[str, Any], record: str, where: str) -> Digest:
    text = fields.get("digest")
    if not isinstance(text, str):
        _fail(record, f"{where}.digest", "is missing or not a string")
    try:
        return parse_digest(text)
    except InvalidArgument as error:
        raise FormatError(record, f"{where}.digest", 0, str(error)) from error


def _size(fields: dict[str, Any], record: str, where: str) -> int:
    size = fields.get("size")
    if not isinstance(size, int) or isinstance(size, bool):
        _fail(record, f"{where}.size", "is missing or not a whole number")
    if not 0 <= size < SIZE_LIMIT:
        _fail(record, f"{where}.size", "is negative or over 63 bits")
    return size


def _data(fields: dict[str, Any]) -> bytes:
    """Embedded content (image-spec, descriptor.md) that is what size and digest say. b"" for any
    other, and for none: then the blob is fetched, as if nothing were embedded."""
    text, size = fields.get("data"), fields["size"]
    if not isinstance(text, str) or size > EMBEDDED_SIZE_MAX or len(text) != -(-size // 3) * 4:
        return b""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return b""
    return data if sha256_digest(data) == fields["digest"] else b""


def _annotations(value: dict[str, Any], record: str, where: str) -> dict[str, str]:
    items = value.get("annotations")
    path = f"{where}.annotations" if where else "annotations"
    if items is None:
        return {}
    if not isinstance(items, dict):
        _fail(record, path, "is not an object")
    if len(items) > ANNOTATIONS_MAX:
        raise LimitExceeded(
            "oci.annotations_max", len(items), ANNOTATIONS_MAX, where=f"{record}: {path}"
        )
    for key, text in items.items():
        if not isinstance(text, str):
            _fail(record, f"{path}[{key[:100]!r}]", "is not a string")
        _check_text(key, record, path, TEXT_LENGTH_MAX)
        _check_text(text, record, path, TEXT_LENGTH_MAX)
    return items


def _platform(value: object, record: str, where: str) -> Platform | None:
    if value is None:
        return None
    fields = _object(value, record, where)
    names = {name: _text(fields, name, record, where) for name in ("os", "architecture", "variant")}
    for name in ("os", "architecture"):
        if not names[name]:
            _fail(record, f"{where}.{name}", "is missing")
    return Platform(**names)


def _subject(value: dict[str, Any], record: str) -> Descriptor | None:
    subject = value.get("subject")
    if subject is None:
        return None
    return parse_descriptor(subject, record=record, where="subject")
