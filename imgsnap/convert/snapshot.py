"""From converted layers to a published snapshot: metadata, chunk map, config, manifest."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
from imgsnap.convert.artifact import (
    LayerArtifact,
    missing_pack,
    pack_descriptor,
    put_raw,
)
from imgsnap.convert.chunk_maps import merge_chunk_maps
from imgsnap.convert.erofs_write import emit
from imgsnap.convert.flatten import flatten
from imgsnap.convert.source import SourceImage
from imgsnap.convert.verity import Seal
from imgsnap.digest import sha256_digest
from imgsnap.errors import FormatError, LimitExceeded, Unavailable, Unsupported
from imgsnap.formats import chunk_map_codec
from imgsnap.formats.frame import compress
from imgsnap.formats.snapshot_config import ExtentConfig, SnapshotConfig, parse_config
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageManifest, raw_manifest
from imgsnap.oci.published import ROOT_HASH, RULES
from imgsnap.oci.repository import Descriptor, RawManifest, WritableRepository
from imgsnap.units import BLOCK_SIZE

METADATA_LEVEL = 9
"""Fetched whole before the first read, once per image: worth 12 % for 3x the time of level 3."""
EMBEDDED_MAX = 4 << 10
"""Parts that are in the manifest too: they come without a request of their own. A small image's
start is then one round trip for all parts; a request costs more than 4 KiB on any link."""
MAP_LEVEL = 3
"""Nearly all of a chunk map is digests, which do not compress."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A published snapshot."""

    manifest: RawManifest
    config: SnapshotConfig
    metadata_stored: int  # bytes of the compressed metadata blob
    chunk_map_stored: int


def check_extents(layers: int, *, verity: bool) -> None:
    """Raises Unsupported when an image has more layers than readers of its snapshot take."""
    maximum = chunk_map_codec.EXTENTS_MAX - verity
    if layers > maximum:
        besides = " besides its hash tree" if verity else ""
        raise Unsupported(
            f"the image has {layers} layers; a snapshot can have {maximum}{besides}",
            hint="no limit can be raised for this; build the image with fewer layers",
        )


def build_snapshot(
    target: WritableRepository,
    image: SourceImage,
    layers: Sequence[LayerArtifact],
    seal: Seal | None = None,
) -> Snapshot:
    """Merges the layers and stores the snapshot by digest, as a referrer of its source image;
    with a hash tree if there is something to seal it.

    The manifest goes last: before it, nothing of the snapshot can be found. Raises Unavailable
    when a pack that was found before is gone: somebody collects garbage. A rerun stores it anew.
    Raises Unsupported when the snapshot would be over a limit of its readers.
    """
    metadata = emit(flatten([layer.index for layer in layers]))
    chunk_map = merge_chunk_maps([layer.chunk_map for layer in layers])
    extents = tuple(
        ExtentConfig(
            diff_id=extent.diff_id,
            chain_id=chain_id,
            extent_id=extent.id,
            base_block=base,
            blocks=extent.total_blocks,
        )
        for extent, chain_id, base in zip(
            chunk_map.extents, image.chain_ids, metadata.bases, strict=True
        )
    )
    sealed = seal(metadata.metadata, metadata.uuid, extents) if seal is not None else None
    if sealed is not None:
        chunk_map = merge_chunk_maps([chunk_map, sealed.chunk_map])
    config = SnapshotConfig(
        os=image.platform.os,
        architecture=image.platform.architecture,
        variant=image.platform.variant,
        rules=layers[0].index.rules.text if layers else "",
        source_manifest=image.manifest.descriptor.digest,
        source_config=image.config.digest,
        metadata_digest=sha256_digest(metadata.metadata),
        metadata_blocks=len(metadata.metadata) // BLOCK_SIZE,
        total_blocks=metadata.total_blocks,
        inode_count=metadata.inode_count,
        uuid=metadata.uuid.hex(),
        extents=extents,
        verity=sealed.config if sealed is not None else None,
    )

    def put_part(data: bytes, media_type: str, level: int | None = None) -> Descriptor:
        """Stores a part; small ones are embedded in the manifest, too."""
        if level is not None:
            data = compress(data, level)
        descriptor = put_raw(target, data, media_type)
        return replace(descriptor, data=data) if len(data) <= EMBEDDED_MAX else descriptor

    encoded_map = chunk_map_codec.encode(chunk_map)
    blobs = (
        put_part(metadata.metadata, media_types.EROFS_METADATA, METADATA_LEVEL),
        put_part(encoded_map, media_types.CHUNK_MAP, MAP_LEVEL),
        put_part(image.config_raw, media_types.OCI_CONFIG),
        *(pack_descriptor(pack) for pack in chunk_map.packs),
    )
    document = ImageManifest(
        config=put_part(config.to_json(), media_types.CONFIG),
        layers=blobs,
        subject=replace(image.manifest.descriptor, platform=None, annotations={}),
        artifact_type=media_types.ARTIFACT_SNAPSHOT,
        annotations={RULES: config.rules, **root_hash_annotation(config)},
    )
    manifest = _readable(document, config, encoded_map)
    gone = missing_pack(target, chunk_map)
    if gone is not None:
        raise Unavailable(
            f"{target.name}: pack {gone.digest} was deleted during the conversion",
            hint="run it again: what is missing is then stored anew",
        )
    target.put_manifest(manifest, subject=image.manifest.descriptor.digest)
    return Snapshot(manifest, config, blobs[0].size, blobs[1].size)


def _readable(document: ImageManifest, config: SnapshotConfig, chunk_map: bytes) -> RawManifest:
    """The manifest's bytes. Raises Unsupported when a reader would refuse these for their size."""
    try:
        manifest = raw_manifest(document)
        snapshot_manifest(manifest)
        parse_config(config.to_json())
        chunk_map_codec.Header.parse(chunk_map)
    except (FormatError, LimitExceeded) as error:
        raise Unsupported(
            f"the image is too large for one snapshot: {error}",
            hint="no limit can be raised for this; build the image with less in it",
        ) from error
    return manifest


def root_hash_annotation(config: SnapshotConfig) -> dict[str, str]:
    """What the manifest says of a hash tree, for people and other tools."""
    return {ROOT_HASH: config.root_hash} if config.root_hash is not None else {}
