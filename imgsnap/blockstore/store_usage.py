"""What a snapshot takes in its repository: bytes it has alone, and bytes others use as well."""

from collections.abc import Iterator
from dataclasses import dataclass

from imgsnap.blockstore.snapshot_manifest import manifest_kind
from imgsnap.digest import Digest, digest_hex
from imgsnap.errors import FormatError, NotFound
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX, parse_config
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document
from imgsnap.oci.repository import RawManifest, Repository

_KINDS = {
    media_types.EROFS_METADATA: "metadata",
    media_types.CHUNK_MAP: "chunk maps",
    media_types.PACK: "packs",
    media_types.LAYER_INDEX: "layer indexes",
    media_types.BLOCK_HASHES: "block hashes",
}
_OTHER = "manifests, configs"


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """Bytes of one snapshot in its repository."""

    digest: Digest
    kinds: dict[str, tuple[int, int]]  # kind to unique and shared bytes

    @property
    def unique(self) -> int:
        return sum(unique for unique, _ in self.kinds.values())

    @property
    def shared(self) -> int:
        return sum(shared for _, shared in self.kinds.values())


def usage(repository: Repository, reference: str) -> StoreUsage:
    """The bytes of the snapshot, or index of snapshots, that a tag or digest names.

    Its converted layers count as its own; what a snapshot under any other tag uses as well is
    shared. Asks for every tag of the repository. Raises NotFound when it is no snapshot.
    """
    layer_tags = _layer_tags(repository)
    own: dict[Digest, tuple[str, int]] = {}
    raw = repository.manifest(reference)
    digests = set()
    for manifest in _snapshots(repository, raw):
        digests.add(manifest.descriptor.digest)
        own.update(_blobs(repository, manifest, layer_tags))
    if not own:
        raise NotFound(f"{repository.name}: {reference} is not a snapshot")
    if raw.descriptor.digest not in digests:
        own[raw.descriptor.digest] = _OTHER, len(raw.raw)
    others: set[Digest] = set()
    for tag in repository.tags():
        if tag.startswith(media_types.LAYER_TAG_PREFIX):
            continue
        try:
            other = repository.manifest(tag)
            if other.descriptor.digest == raw.descriptor.digest:
                continue
            for manifest in _snapshots(repository, other):
                if manifest.descriptor.digest not in digests:
                    others.update(_blobs(repository, manifest, layer_tags))
                else:
                    others.update(own)
        except (FormatError, NotFound):
            continue
    kinds: dict[str, tuple[int, int]] = dict.fromkeys((*_KINDS.values(), _OTHER), (0, 0))
    for digest, (kind, size) in own.items():
        unique, shared = kinds[kind]
        if digest in others:
            kinds[kind] = unique, shared + size
        else:
            kinds[kind] = unique + size, shared
    return StoreUsage(raw.descriptor.digest, kinds)


def _layer_tags(repository: Repository) -> dict[str, list[str]]:
    """The tags of the layer artefacts, by the diffID's hex that ends them."""
    found: dict[str, list[str]] = {}
    for tag in repository.tags(media_types.LAYER_TAG_PREFIX):
        found.setdefault(tag.rpartition("-")[2], []).append(tag)
    return found


def _snapshots(repository: Repository, raw: RawManifest) -> Iterator[RawManifest]:
    """The snapshots' manifests that a manifest is, or lists."""
    kind = manifest_kind(raw)
    if kind.is_snapshot:
        yield raw
    for entry in kind.entries or ():
        try:
            child = repository.manifest(entry.digest)
        except NotFound:
            continue
        if manifest_kind(child).is_snapshot:
            yield child


def _blobs(
    repository: Repository, raw: RawManifest, layer_tags: dict[str, list[str]]
) -> dict[Digest, tuple[str, int]]:
    """Every blob of a snapshot and of its converted layers, with kind and size."""
    found = _document_blobs(raw)
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        raise AssertionError("not an index")
    config = parse_config(repository.blob(document.config, size_max=CONFIG_SIZE_MAX))
    for extent in config.extents:
        for tag in layer_tags.get(digest_hex(extent.diff_id), ()):
            try:
                found.update(_document_blobs(repository.manifest(tag)))
            except (FormatError, NotFound):
                continue
    return found


def _document_blobs(raw: RawManifest) -> dict[Digest, tuple[str, int]]:
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    found = {raw.descriptor.digest: (_OTHER, len(raw.raw))}
    if isinstance(document, ImageManifest):
        for blob in (document.config, *document.layers):
            found[blob.digest] = _KINDS.get(blob.media_type, _OTHER), blob.size
    return found
