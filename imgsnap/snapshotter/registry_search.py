"""Asks a registry for the snapshot of an image: referrers, then the index that the tag names.

A snapshot counts only if its config says that it was made from exactly the image's layers. The
image's own manifest and config are fetched for that, each verified by digest.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.resolve import by_preference, fetch_snapshot
from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
from imgsnap.convert.limits import Limits
from imgsnap.convert.source import SourceImage, select_images
from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import DigestMismatch, IntegrityError, NotFound, Unsupported
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX, SnapshotConfig, parse_config
from imgsnap.oci.manifest import ImageIndex, parse_document
from imgsnap.oci.media_types import ARTIFACT_SNAPSHOT
from imgsnap.oci.published import SOURCE
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Descriptor, RawManifest, Repository
from imgsnap.snapshotter.image_labels import repository_name
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot

CANDIDATES_MAX = 8
"""Anybody who may push can add referrers: this many are looked at."""
_BROKEN = (IntegrityError, NotFound, Unsupported)
"""What is wrong with one candidate says nothing about the next."""

_log = logging.getLogger(__name__)


def search(
    repository: Repository, image: RegistryLocation, manifest: Digest, cache: NodeCache
) -> ImageSnapshot | None:
    """The snapshot of the image with this manifest; None when the registry has none for it.

    What is fetched of the snapshot is kept in `cache`, where opening it finds it. Raises
    Unavailable and AccessDenied: then nothing is known.
    """
    source: SourceImage | None = None
    for candidate in islice(_candidates(repository, image, manifest), CANDIDATES_MAX):
        # Not before there is a candidate: most images have no snapshot.
        source = source or _read_image(repository, manifest)
        try:
            raw = fetch_snapshot(repository, candidate.digest, cache)
            _check_source(_config(repository, raw, cache), source)
        except _BROKEN as error:
            _log.warning("%s: %s is not taken: %s", repository.name, candidate.digest, error)
            continue
        name = repository_name(image)
        return ImageSnapshot(name, candidate.digest, image_layers(source))
    return None


def image_layers(image: SourceImage) -> tuple[ImageLayer, ...]:
    """The layers of an ordinary image, bottom first."""
    return tuple(
        ImageLayer(
            layer.diff_id,
            layer.descriptor.digest,
            layer.descriptor.size,
            layer.descriptor.media_type,
            chain_id,
        )
        for layer, chain_id in zip(image.layers, image.chain_ids, strict=True)
    )


def _candidates(
    repository: Repository, image: RegistryLocation, manifest: Digest
) -> Iterator[Descriptor]:
    """The newest referrer first, then siblings; each way is gone when the one before is over."""
    seen = set()
    for way in (_referrers, _siblings):
        try:
            found = list(way(repository, image, manifest))
        except _BROKEN as error:
            _log.warning("%s: %s", repository.name, error)
            continue
        for descriptor in found:
            if descriptor.digest not in seen:
                seen.add(descriptor.digest)
                yield descriptor


def _referrers(
    repository: Repository, image: RegistryLocation, manifest: Digest
) -> Iterable[Descriptor]:
    return by_preference(repository.referrers(manifest, ARTIFACT_SNAPSHOT))


def _siblings(
    repository: Repository, image: RegistryLocation, manifest: Digest
) -> Iterable[Descriptor]:
    """Entries of the index by which the image was pulled that say they are its snapshot."""
    if image.reference == manifest:
        return ()
    raw = repository.manifest(image.reference)
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if not isinstance(document, ImageIndex):
        return ()
    return [
        entry
        for entry in document.manifests
        if entry.digest != manifest
        and (entry.annotations.get(SOURCE) == manifest or entry.artifact_type == ARTIFACT_SNAPSHOT)
    ]


def _read_image(repository: Repository, manifest: Digest) -> SourceImage:
    (image,) = select_images(repository, manifest, (), Limits())
    got = sha256_digest(image.manifest.raw)
    if got != manifest:  # an index: the label names manifests only
        raise DigestMismatch(f"{repository.name}: image manifest", manifest, got)
    return image


def _config(repository: Repository, raw: RawManifest, cache: NodeCache) -> SnapshotConfig:
    descriptor = snapshot_manifest(raw).config
    config = cache.load_blob(descriptor.digest)
    if config is None:
        config = repository.blob(descriptor, size_max=CONFIG_SIZE_MAX)
        got = sha256_digest(config)
        if got != descriptor.digest:
            raise DigestMismatch("snapshot config", descriptor.digest, got)
        cache.store_blob(descriptor.digest, config)
    return parse_config(config)


def _check_source(config: SnapshotConfig, image: SourceImage) -> None:
    made_from = [extent.diff_id for extent in config.extents]
    if made_from != [layer.diff_id for layer in image.layers]:
        raise IntegrityError("it was made from the layers of another image")
    if [extent.chain_id for extent in config.extents] != image.chain_ids:
        raise IntegrityError("its chainIDs are not those of its layers")
