"""Opening a snapshot: manifest, config, metadata and chunk map, verified against each other."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.resolve import Admit, admit_all, resolve_snapshot
from imgsnap.blockstore.snapshot_manifest import SnapshotManifest, snapshot_manifest
from imgsnap.digest import Digest, digest_from_raw, sha256_digest
from imgsnap.errors import DigestMismatch, FormatError, IntegrityError, NotFound
from imgsnap.formats.chunk_map import ChunkMap
from imgsnap.formats.chunk_map_codec import CHUNK_MAP_SIZE_MAX, decode
from imgsnap.formats.frame import decompress, decompress_exact
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX, SnapshotConfig, parse_config
from imgsnap.oci.platforms import matches
from imgsnap.oci.repository import Descriptor, Platform, Repository
from imgsnap.units import BLOCK_SIZE, GIB, MIB

METADATA_BLOB_SIZE_MAX = GIB + (GIB >> 8)
"""METADATA_BLOCKS_MAX of the config, and what zstd adds to bytes it cannot compress."""
IMAGE_CONFIG_SIZE_MAX = 8 * MIB


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An opened snapshot: everything but the bytes of its extents. Close it after its reader."""

    repository: Repository
    reference: str
    manifest: SnapshotManifest
    config: SnapshotConfig
    chunk_map: ChunkMap
    metadata: BinaryIO  # the region's bytes from offset 0; more may follow them
    stale: bool  # the registry was unreachable and the tag was answered from the cache

    @property
    def metadata_size(self) -> int:
        return self.config.metadata_blocks * BLOCK_SIZE

    @property
    def size(self) -> int:
        """Bytes of the device."""
        return self.config.device_blocks * BLOCK_SIZE

    def close(self) -> None:
        self.metadata.close()


def open_snapshot(
    repository: Repository,
    reference: str,
    cache: NodeCache,
    *,
    platform: Platform | None = None,
    image_config: bool = False,
    admit: Admit = admit_all,
    meanwhile: Callable[[Digest], None] = lambda digest: None,
) -> Snapshot:
    """Opens the snapshot that a tag or digest names, in at most two sequential round trips.

    (An index or an ordinary image costs more: it names the snapshot indirectly.) With
    `image_config` the cache has the source image's config afterwards, in the same round trips.
    `admit` is asked first whether it may be opened. `meanwhile` gets the manifest's digest before
    parts are fetched, and is not called when all are cached. Raises
    IntegrityError when a blob is not what its digest says or the parts contradict each other,
    NotFound, UnsupportedFormat, and what the repository and `admit` raise.
    """
    resolution = resolve_snapshot(repository, reference, cache, platform)
    admit(repository, reference, resolution.documents)
    manifest = snapshot_manifest(resolution.manifest)
    also = [manifest.image_config] if image_config and manifest.image_config is not None else []
    config, metadata, chunk_map = _load_parts(repository, manifest, cache, also, meanwhile)
    try:
        offered = Platform(config.os, config.architecture, config.variant)
        if platform is not None and not matches(offered, platform):
            raise NotFound(f"{reference} is for {offered}, not for {platform}")
        _check_parts(manifest, config, chunk_map)
    except BaseException:
        metadata.close()
        raise
    return Snapshot(repository, reference, manifest, config, chunk_map, metadata, resolution.stale)


def read_image_config(snapshot: Snapshot, cache: NodeCache) -> bytes:
    """The source image's config, which the snapshot carries: command, environment, user.

    Raises NotFound for a snapshot without one.
    """
    descriptor = snapshot.manifest.image_config
    if descriptor is None:
        raise NotFound(f"snapshot {snapshot.manifest.digest} carries no image config")
    raw = cache.load_blob(descriptor.digest)
    if raw is None:
        raw = _blob(snapshot.repository, descriptor, IMAGE_CONFIG_SIZE_MAX)
        cache.store_blob(descriptor.digest, raw)
    return raw


def _load_parts(
    repository: Repository,
    manifest: SnapshotManifest,
    cache: NodeCache,
    also: Sequence[Descriptor],
    meanwhile: Callable[[Digest], None],
) -> tuple[SnapshotConfig, BinaryIO, ChunkMap]:
    """The three blobs from the cache, and those that are missing in parallel; small blobs that are
    only to be cached go with them."""
    raw_config = cache.load_blob(manifest.config.digest)
    raw_map = cache.load_chunk_map(manifest.chunk_map.digest)
    metadata = _cached_metadata(raw_config, cache)
    missing: list[tuple[Descriptor, int]] = []
    if raw_config is None:
        missing.append((manifest.config, CONFIG_SIZE_MAX))
    if raw_map is None:
        missing.append((manifest.chunk_map, CHUNK_MAP_SIZE_MAX))
    if metadata is None:
        missing.append((manifest.metadata, METADATA_BLOB_SIZE_MAX))
    missing += [
        (descriptor, IMAGE_CONFIG_SIZE_MAX)
        for descriptor in also
        if cache.load_blob(descriptor.digest) is None
    ]
    if missing:
        meanwhile(manifest.digest)
    try:
        got = _get(repository, missing)
        for descriptor in also:
            if descriptor.digest in got:
                cache.store_blob(descriptor.digest, got[descriptor.digest])
        if raw_config is None:
            raw_config = got[manifest.config.digest]
            cache.store_blob(manifest.config.digest, raw_config)
        if raw_map is None:
            blob = got[manifest.chunk_map.digest]
            raw_map = decompress(blob, size_max=CHUNK_MAP_SIZE_MAX, record="chunk map blob")
            cache.store_chunk_map(manifest.chunk_map.digest, raw_map)
        config = parse_config(raw_config)
        chunk_map = decode(raw_map)
        if metadata is None:
            region = _region(got[manifest.metadata.digest], config)
            metadata = cache.store_metadata(config.metadata_digest, region)
    except BaseException:
        if metadata is not None:
            metadata.close()
        raise
    return config, metadata, chunk_map


def _get(repository: Repository, wanted: Sequence[tuple[Descriptor, int]]) -> dict[Digest, bytes]:
    """Blobs by their digest: those that the manifest embeds from there, the others, each of at most
    so many bytes, in one round trip."""
    embedded = {descriptor.digest: descriptor.data for descriptor, _ in wanted if descriptor.data}
    calls = {
        descriptor.digest: partial(_blob, repository, descriptor, size_max)
        for descriptor, size_max in wanted
        if not descriptor.data
    }
    return embedded | _in_parallel(calls)


def _blob(repository: Repository, descriptor: Descriptor, size_max: int) -> bytes:
    if descriptor.data:
        return descriptor.data
    raw = repository.blob(descriptor, size_max=size_max)
    # Repositories verify too; a second look here costs little and trusts no implementation.
    got = sha256_digest(raw)
    if got != descriptor.digest:
        raise DigestMismatch("blob", descriptor.digest, got)
    return raw


def _cached_metadata(raw_config: bytes | None, cache: NodeCache) -> BinaryIO | None:
    if raw_config is None:
        return None  # only the config knows the region's digest
    config = parse_config(raw_config)
    return cache.open_metadata(config.metadata_digest, config.metadata_blocks * BLOCK_SIZE)


def _region(blob: bytes, config: SnapshotConfig) -> bytes:
    region = decompress_exact(
        blob, config.metadata_blocks * BLOCK_SIZE, record="EROFS metadata blob"
    )
    got = sha256_digest(region)
    if got != config.metadata_digest:
        raise DigestMismatch("EROFS metadata", config.metadata_digest, got)
    return region


def _check_parts(manifest: SnapshotManifest, config: SnapshotConfig, chunk_map: ChunkMap) -> None:
    """The chunk map describes the config's extents, in packs that the manifest lists."""
    stated = [(extent.diff_id, extent.blocks, extent.extent_id) for extent in config.extents]
    if config.verity is not None:
        tree = config.verity.extent
        name = digest_from_raw(bytes.fromhex(config.verity.root_hash))
        stated.append((name, tree.blocks, tree.extent_id))
    if manifest.root_hash != config.root_hash:
        said = " and ".join(
            str(hash_ or "none") for hash_ in (manifest.root_hash, config.root_hash)
        )
        raise IntegrityError(f"manifest and config state different dm-verity root hashes: {said}")
    if len(chunk_map.extents) != len(stated):
        raise IntegrityError(
            f"chunk map has {len(chunk_map.extents)} extents, config {len(stated)}"
        )
    for number, (extent, pure) in enumerate(zip(chunk_map.extents, stated, strict=True)):
        if (extent.diff_id, extent.total_blocks, extent.id) != pure:
            raise IntegrityError(
                f"extent {number} of the chunk map ({extent.diff_id}) is not the config's"
            )
    for pack in chunk_map.packs:
        listed = manifest.packs.get(pack.digest)
        if listed is None or listed.size != pack.size:
            raise FormatError(
                "manifest", "layers", 0, f"pack {pack.digest} of the chunk map is not listed"
            )


def _in_parallel(calls: Mapping[Digest, Callable[[], bytes]]) -> dict[Digest, bytes]:
    """The results of all calls, or the first one's exception."""
    results: dict[Digest, bytes] = {}
    errors: list[BaseException] = []
    if not calls:
        return results

    def run(name: Digest, call: Callable[[], bytes]) -> None:
        try:
            results[name] = call()
        except BaseException as error:
            errors.append(error)

    *others, last = calls.items()
    threads: list[Any] = [
        threading.Thread(target=run, args=item, daemon=True, name="open") for item in others
    ]
    for thread in threads:
        thread.start()
    run(*last)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
