"""The little of an OCI manifest or index that opening a snapshot needs, read from hostile bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import FormatError, InvalidArgument, LimitExceeded
from imgsnap.oci.repository import MANIFEST_SIZE_MAX, Descriptor, Platform, RawManifest

SNAPSHOT_TYPE = "application/vnd.imgsnap.snapshot.v1+json"
CONFIG_TYPE = "application/vnd.imgsnap.config.v1+json"
METADATA_TYPE = "application/vnd.imgsnap.erofs-metadata.v1+zstd"
CHUNK_MAP_TYPE = "application/vnd.imgsnap.chunk-map.v1+zstd"
PACK_TYPE = "application/vnd.imgsnap.pack.v1"
IMAGE_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
RECORD = "manifest"
LAYERS_MAX = 1 << 14
"""A manifest of 4 MiB holds about this many descriptors."""
BLOB_SIZE_MAX = 1 << 40


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """A snapshot's manifest: where its config, metadata, chunk map and packs are."""

    digest: Digest
    config: Descriptor
    metadata: Descriptor
    chunk_map: Descriptor
    image_config: Descriptor | None
    packs: Mapping[Digest, Descriptor]


@dataclass(frozen=True, slots=True)
class ManifestKind:
    """What a manifest turned out to be: a snapshot, an index (its entries), or an image."""

    is_snapshot: bool
    entries: tuple[Descriptor, ...] | None


def manifest_kind(raw: RawManifest) -> ManifestKind:
    """Looks only at the fields that tell kinds apart. Raises FormatError."""
    value = _load(raw.raw)
    media_type = value.get("mediaType") or raw.descriptor.media_type
    if media_type in INDEX_TYPES or "manifests" in value:
        return ManifestKind(False, _descriptors(value, "manifests"))
    config = value.get("config")
    config_type = config.get("mediaType") if isinstance(config, dict) else None
    is_snapshot = value.get("artifactType") == SNAPSHOT_TYPE or config_type == CONFIG_TYPE
    return ManifestKind(is_snapshot, None)


def snapshot_manifest(raw: RawManifest) -> SnapshotManifest:
    """The value of a snapshot's manifest. Raises FormatError."""
    value = _load(raw.raw)
    config = _descriptor(value.get("config"), "config")
    if config.media_type != CONFIG_TYPE:
        raise FormatError(RECORD, "config.mediaType", 0, f"{config.media_type[:100]!r}")
    layers = _descriptors(value, "layers")
    by_type: dict[str, list[Descriptor]] = {}
    for layer in layers:
        by_type.setdefault(layer.media_type, []).append(layer)
    for media_type in (METADATA_TYPE, CHUNK_MAP_TYPE):
        if len(by_type.get(media_type, ())) != 1:
            raise FormatError(RECORD, "layers", 0, f"not exactly one layer of type {media_type}")
    images = by_type.get(IMAGE_CONFIG_TYPE, [])
    return SnapshotManifest(
        digest=raw.descriptor.digest,
        config=config,
        metadata=by_type[METADATA_TYPE][0],
        chunk_map=by_type[CHUNK_MAP_TYPE][0],
        image_config=images[0] if images else None,
        packs={pack.digest: pack for pack in by_type.get(PACK_TYPE, ())},
    )


def _load(raw: bytes) -> dict[str, Any]:
    if len(raw) > MANIFEST_SIZE_MAX:
        raise LimitExceeded("manifest-size", len(raw), MANIFEST_SIZE_MAX, where=RECORD)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(RECORD, "JSON", 0, str(error)[:200]) from error
    if not isinstance(value, dict):
        raise FormatError(RECORD, "value", 0, "is not an object")
    return value


def _descriptors(value: dict[str, Any], key: str) -> tuple[Descriptor, ...]:
    items = value.get(key)
    if not isinstance(items, list) or len(items) > LAYERS_MAX:
        raise FormatError(RECORD, key, 0, f"is not a list of at most {LAYERS_MAX} items")
    return tuple(_descriptor(item, f"{key}[{number}]") for number, item in enumerate(items))


def _descriptor(value: Any, where: str) -> Descriptor:
    if not isinstance(value, dict):
        raise FormatError(RECORD, where, 0, "is not an object")
    try:
        digest = parse_digest(value.get("digest", ""), what=f"{where}.digest")
    except InvalidArgument as error:
        raise FormatError(RECORD, f"{where}.digest", 0, str(error)) from error
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= BLOB_SIZE_MAX:
        raise FormatError(RECORD, f"{where}.size", 0, f"{str(size)[:40]!r}")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise FormatError(RECORD, f"{where}.annotations", 0, "is not an object")
    return Descriptor(
        media_type=_text(value, "mediaType", where),
        digest=digest,
        size=size,
        annotations={str(key): str(text) for key, text in annotations.items()},
        artifact_type=_text(value, "artifactType", where),
        platform=_platform(value.get("platform"), f"{where}.platform"),
    )


def _platform(value: Any, where: str) -> Platform | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise FormatError(RECORD, where, 0, "is not an object")
    return Platform(*(_text(value, key, where) for key in ("os", "architecture", "variant")))


def _text(value: dict[str, Any], key: str, where: str) -> str:
    text = value.get(key, "")
    if not isinstance(text, str) or len(text) > 1024:
        raise FormatError(RECORD, f"{where}.{key}", 0, "is not a short string")
    return text
