"""What opening a snapshot needs to know of a manifest or an index."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.formats.stub_layer import ANNOTATION
from imgsnap.formats.verity import is_root_hash
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document, parse_manifest
from imgsnap.oci.published import ROOT_HASH
from imgsnap.oci.repository import Descriptor, RawManifest

RECORD = "snapshot manifest"


@dataclass(frozen=True, slots=True)
class SnapshotManifest:
    """A snapshot's manifest: where its config, metadata, chunk map and packs are."""

    digest: Digest
    config: Descriptor
    metadata: Descriptor
    chunk_map: Descriptor
    image_config: Descriptor | None
    packs: Mapping[Digest, Descriptor]
    root_hash: str | None = None  # of the dm-verity tree, hex; the config has to state the same


class ManifestKind(NamedTuple):
    """What a manifest turned out to be: a snapshot, an index (its entries), or an image; of a
    converted image, the digest of its snapshot."""

    is_snapshot: bool
    entries: tuple[Descriptor, ...] | None
    snapshot: Digest | None = None


def manifest_kind(raw: RawManifest) -> ManifestKind:
    """Tells the kinds apart. Raises FormatError, LimitExceeded and Unsupported."""
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        return ManifestKind(False, document.manifests)
    is_snapshot = document.config.media_type == media_types.CONFIG
    return ManifestKind(is_snapshot, None, None if is_snapshot else stands_for(document))


def stands_for(image: ImageManifest) -> Digest | None:
    """The digest of the snapshot that a converted image's stub layer names; None for any other.

    Raises FormatError for an annotation that is no digest.
    """
    if len(image.layers) != 1 or ANNOTATION not in image.layers[0].annotations:
        return None
    try:
        return parse_digest(image.layers[0].annotations[ANNOTATION])
    except InvalidArgument as error:
        raise FormatError("image manifest", ANNOTATION, 0, str(error)) from error


def snapshot_manifest(raw: RawManifest) -> SnapshotManifest:
    """The value of a snapshot's manifest. Raises FormatError, LimitExceeded and Unsupported."""
    document = parse_manifest(
        raw.raw, media_type=raw.descriptor.media_type, record=f"{RECORD} {raw.descriptor.digest}"
    )
    if document.config.media_type != media_types.CONFIG:
        raise FormatError(RECORD, "config.mediaType", 0, document.config.media_type)
    by_type: dict[str, list[Descriptor]] = {}
    for layer in document.layers:
        by_type.setdefault(layer.media_type, []).append(layer)
    for media_type in (media_types.EROFS_METADATA, media_types.CHUNK_MAP):
        if len(by_type.get(media_type, ())) != 1:
            raise FormatError(RECORD, "layers", 0, f"not exactly one layer of type {media_type}")
    images = by_type.get(media_types.OCI_CONFIG, [])
    return SnapshotManifest(
        digest=raw.descriptor.digest,
        config=document.config,
        metadata=by_type[media_types.EROFS_METADATA][0],
        chunk_map=by_type[media_types.CHUNK_MAP][0],
        image_config=images[0] if images else None,
        packs={pack.digest: pack for pack in by_type.get(media_types.PACK, ())},
        root_hash=_root_hash(document),
    )


def _root_hash(document: ImageManifest) -> str | None:
    root_hash = document.annotations.get(ROOT_HASH)
    if root_hash is not None and not is_root_hash(root_hash):
        raise FormatError(RECORD, ROOT_HASH, 0, "is not 64 hex digits")
    return root_hash
