"""Layer artefacts: one layer's conversion, kept in the target under a tag that its diffID names.

They make the target its own conversion cache: a later conversion, on any machine, finds them by
one manifest GET and neither downloads nor converts that layer again.
"""

from dataclasses import dataclass

from imgsnap.convert.ingest import LayerSource
from imgsnap.digest import Digest, digest_hex, sha256_digest
from imgsnap.errors import FormatError, NotFound
from imgsnap.formats import chunk_map_codec, frame, layer_index_codec
from imgsnap.formats.chunk_map import ChunkMap, PackRef
from imgsnap.formats.layer_index import LayerIndex
from imgsnap.formats.rules import Rules
from imgsnap.formats.verity import HASH_BYTES
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageManifest, parse_manifest, raw_manifest
from imgsnap.oci.published import RULES
from imgsnap.oci.repository import Descriptor, RawManifest, Repository, WritableRepository
from imgsnap.units import MIB

RECORD = "layer artefact"
DIFF_ID = "io.imgsnap.layer.diffid"
EMPTY = b"{}"
INDEX_LEVEL = 3
INDEX_BLOB_MAX = 256 * MIB
INDEX_SIZE_MAX = 1 << 30
MAP_BLOB_MAX = 256 * MIB


@dataclass(frozen=True, slots=True)
class LayerArtifact:
    """A converted layer as the target holds it."""

    index: LayerIndex
    chunk_map: ChunkMap
    hashes: Descriptor | None = None  # of its blocks, if it was ever part of a hash tree


def layer_tag(diff_id: Digest, rules: Rules) -> str:
    """The tag of a layer's artefact; at most 87 of a tag's 128 characters."""
    return f"{media_types.LAYER_TAG_PREFIX}{rules.id}-{digest_hex(diff_id)}"


def find_artifact(repository: Repository, layer: LayerSource, rules: Rules) -> LayerArtifact | None:
    """The layer's conversion, verified; None when the repository has none.

    Raises IntegrityError for one that does not hold together, and what the repository raises.
    """
    try:
        raw = repository.manifest(layer_tag(layer.diff_id, rules))
    except NotFound:
        return None
    manifest = parse_manifest(raw.raw, record=RECORD)
    index_raw = repository.blob(_only(manifest, media_types.LAYER_INDEX), size_max=INDEX_BLOB_MAX)
    index = layer_index_codec.decode(
        frame.decompress(index_raw, size_max=INDEX_SIZE_MAX, record="layer index")
    )
    chunk_map = read_chunk_map(repository, manifest)
    if index.diff_id != layer.diff_id or index.rules != rules:
        raise FormatError(RECORD, "index", 0, f"is of another layer or rules: {index.diff_id}")
    if [extent.diff_id for extent in chunk_map.extents] != [layer.diff_id]:
        raise FormatError(RECORD, "chunk map", 0, "is of another layer")
    if chunk_map.extents[0].total_blocks != index.extent_blocks:
        raise FormatError(RECORD, "chunk map", 0, "does not cover the layer's extent")
    return LayerArtifact(index, chunk_map, _hashes(manifest, index))


def _hashes(manifest: ImageManifest, index: LayerIndex) -> Descriptor | None:
    if all(layer.media_type != media_types.BLOCK_HASHES for layer in manifest.layers):
        return None
    descriptor = _only(manifest, media_types.BLOCK_HASHES)
    if descriptor.size != index.extent_blocks * HASH_BYTES:
        raise FormatError(RECORD, "block hashes", 0, f"{descriptor.size} bytes")
    return descriptor


def read_chunk_map(repository: Repository, manifest: ImageManifest) -> ChunkMap:
    """The chunk map that a layer artefact or a snapshot lists. Its packs must be listed too."""
    raw = repository.blob(_only(manifest, media_types.CHUNK_MAP), size_max=MAP_BLOB_MAX)
    size_max = chunk_map_codec.CHUNK_MAP_SIZE_MAX
    chunk_map = chunk_map_codec.decode(frame.decompress(raw, size_max=size_max, record="chunk map"))
    listed = {
        PackRef(layer.digest, layer.size)
        for layer in manifest.layers
        if layer.media_type == media_types.PACK
    }
    if not listed.issuperset(chunk_map.packs):
        raise FormatError(RECORD, "layers", 0, "lack a pack that the chunk map uses")
    return chunk_map


def _only(manifest: ImageManifest, media_type: str) -> Descriptor:
    found = [layer for layer in manifest.layers if layer.media_type == media_type]
    if len(found) != 1:
        raise FormatError(RECORD, "layers", 0, f"{len(found)} blobs of type {media_type}")
    return found[0]


def pack_descriptor(pack: PackRef) -> Descriptor:
    return Descriptor(media_types.PACK, pack.digest, pack.size)


def missing_pack(repository: Repository, chunk_map: ChunkMap) -> PackRef | None:
    """A pack of the map that the repository does not have."""
    for pack in chunk_map.packs:
        if not repository.has_blob(pack_descriptor(pack)):
            return pack
    return None


def put_content(
    target: WritableRepository, content: bytes, media_type: str, level: int
) -> Descriptor:
    """Stores `content` as one zstd frame."""
    return put_raw(target, frame.compress(content, level), media_type)


def put_raw(target: WritableRepository, data: bytes, media_type: str) -> Descriptor:
    """Stores `data` as a blob."""
    descriptor = Descriptor(media_type, sha256_digest(data), len(data))
    target.put_bytes(descriptor, data)
    return descriptor


def put_empty(target: WritableRepository) -> None:
    """Stores the config that all artefacts have."""
    put_raw(target, EMPTY, media_types.OCI_EMPTY)


def publish_artifact(
    target: WritableRepository,
    index: LayerIndex,
    chunk_map: ChunkMap,
    hashes: Descriptor | None = None,
) -> LayerArtifact:
    """Stores a layer's artefact; its packs, and the hashes of its blocks, must be in the target
    already.

    Before several of them at a time, `put_empty`: docker-registry refuses a manifest while
    another client stores a blob that it lists.
    """
    layers = (
        put_content(target, layer_index_codec.encode(index), media_types.LAYER_INDEX, INDEX_LEVEL),
        put_content(target, chunk_map_codec.encode(chunk_map), media_types.CHUNK_MAP, INDEX_LEVEL),
        *(pack_descriptor(pack) for pack in chunk_map.packs),
        *([hashes] if hashes is not None else []),
    )
    document = ImageManifest(
        config=put_raw(target, EMPTY, media_types.OCI_EMPTY),
        layers=layers,
        artifact_type=media_types.ARTIFACT_LAYER,
        annotations={DIFF_ID: index.diff_id, RULES: index.rules.text},
    )
    raw: RawManifest = raw_manifest(document)
    target.put_manifest(raw, [layer_tag(index.diff_id, index.rules)])
    return LayerArtifact(index, chunk_map, hashes)
