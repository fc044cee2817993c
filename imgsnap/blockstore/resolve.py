"""From a tag or digest to a snapshot's manifest: directly, through an index, or as a referrer."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot_manifest import ManifestKind, manifest_kind
from imgsnap.digest import Digest, as_digest, parse_digest
from imgsnap.errors import ImgsnapError, NotFound, Unavailable
from imgsnap.oci.media_types import ARTIFACT_SNAPSHOT
from imgsnap.oci.platforms import host_platform, matches
from imgsnap.oci.repository import Descriptor, Platform, RawManifest, Repository

CREATED = "org.opencontainers.image.created"

_log = logging.getLogger(__name__)


class Resolution(NamedTuple):
    """What a reference named; `stale` when an unreachable registry was replaced by the cache.

    `documents` begin with the snapshot's manifest. Those that follow led to it and commit to it by
    digest: the converted image, the index. An image of which it is a referrer does not.
    """

    documents: tuple[RawManifest, ...]
    stale: bool

    @property
    def manifest(self) -> RawManifest:
        """The snapshot's."""
        return self.documents[0]


Admit = Callable[[Repository, str, Sequence[RawManifest]], None]
"""Called with repository, reference and `Resolution.documents` before anything else of a snapshot
is fetched or used. Raises what is to become of the opening."""


def admit_all(repository: Repository, reference: str, documents: Sequence[RawManifest]) -> None:
    """Whoever made it: the digest is right."""


def resolve_snapshot(
    repository: Repository, reference: str, cache: NodeCache, platform: Platform | None = None
) -> Resolution:
    """Finds the snapshot that `reference` names.

    A snapshot's digest with a cached manifest costs no round trip. A tag always asks the
    repository; only when that is Unavailable is the last answer used, with a warning. An index
    is searched for `platform` (this machine's by default), an ordinary image for referrers; a
    converted image names its snapshot. Raises NotFound, and what the repository raises.
    """
    cached = _cached_manifest(cache, reference)
    if cached and manifest_kind(cached).is_snapshot:
        return Resolution((cached,), stale=False)
    key = _key(repository.name, reference, platform)
    try:
        documents = _ask(repository, reference, cache, platform)
    except Unavailable as error:
        remembered = _remembered(cache, key)
        if remembered is None:
            raise
        _log.warning(
            "%s does not answer (%s); using %s, which %s named before",
            repository.name,
            error,
            remembered.descriptor.digest,
            reference,
        )
        return Resolution((remembered,), stale=True)
    name = f"{repository.name}{'@' if reference.startswith('sha256:') else ':'}{reference}"
    value = {"digest": documents[0].descriptor.digest, "name": name}
    cache.store_tag(key, json.dumps(value).encode())
    return Resolution(documents, stale=False)


def remembered_snapshot(
    repository: str, reference: str, cache: NodeCache, platform: Platform | None = None
) -> RawManifest | None:
    """What `resolve_snapshot` found last in the repository of this name, from the cache alone."""
    return _remembered(cache, _key(repository, reference, platform))


def is_known(
    repository: str, reference: str, cache: NodeCache, platform: Platform | None = None
) -> bool:
    """Whether this node has resolved the reference before: then it has the snapshot's parts too,
    unless they were evicted."""
    if cache.load_tag(_key(repository, reference, platform)) is not None:
        return True
    return _cached_manifest(cache, reference) is not None


def _key(repository: str, reference: str, platform: Platform | None) -> str:
    return f"{repository}\0{reference}\0{platform or ''}"


def _ask(
    repository: Repository, reference: str, cache: NodeCache, platform: Platform | None
) -> tuple[RawManifest, ...]:
    manifest = _manifest(repository, reference, cache)
    kind = manifest_kind(manifest)
    above: tuple[RawManifest, ...] = ()
    if kind.entries is not None:
        above = (manifest,)
        where = f"{repository.name}: {reference}"
        entry = _choose_entry(kind, platform or host_platform(), where)
        manifest = _manifest(repository, entry.digest, cache)
        kind = manifest_kind(manifest)
    if kind.is_snapshot:
        return (manifest, *above)
    if kind.entries is not None:
        raise NotFound(f"{repository.name}: {reference} is an index of indexes, not a snapshot")
    if kind.snapshot is not None:
        return (fetch_snapshot(repository, kind.snapshot, cache), manifest, *above)
    found = repository.referrers(manifest.descriptor.digest, ARTIFACT_SNAPSHOT)
    fitting = by_preference(found, platform)
    if not fitting:
        raise NotFound(
            f"{repository.name}: {reference} is an image without a snapshot"
            + (f" for {platform}" if found else ""),
            hint="make one with `imgsnap convert`",
        )
    return (fetch_snapshot(repository, fitting[0].digest, cache),)


def fetch_snapshot(repository: Repository, digest: Digest, cache: NodeCache) -> RawManifest:
    """The snapshot's manifest with this digest, from the cache or the repository. Raises NotFound
    when it is something else, and what the repository raises."""
    manifest = _manifest(repository, digest, cache)
    if not manifest_kind(manifest).is_snapshot:
        raise NotFound(f"{repository.name}: {digest} is not a snapshot")
    return manifest


def _choose_entry(kind: ManifestKind, wanted: Platform, where: str) -> Descriptor:
    entries = kind.entries or ()
    snapshots = [e for e in entries if e.artifact_type == ARTIFACT_SNAPSHOT and _runs(e)]
    candidates = [e for e in snapshots or entries if _runs(e)]
    for entry in candidates:
        if entry.platform and matches(entry.platform, wanted):
            return entry
    available = ", ".join(sorted({str(e.platform) for e in candidates})) or "none"
    raise NotFound(
        f"{where} has nothing for {wanted}; it has: {available}",
        hint="choose one with --platform",
    )


def _runs(entry: Descriptor) -> bool:
    """Not an attestation, nor the snapshot behind a converted image."""
    return entry.platform is not None and entry.platform.architecture != "unknown"


def by_preference(found: Iterable[Descriptor], wanted: Platform | None = None) -> list[Descriptor]:
    """Referrers for a platform, the newest first; those that state no time last, by digest."""
    fitting = [d for d in found if not (wanted and d.platform and not matches(d.platform, wanted))]
    fitting.sort(key=lambda d: d.digest)
    fitting.sort(key=lambda d: d.annotations.get(CREATED, ""), reverse=True)
    return fitting


def _manifest(repository: Repository, reference: str, cache: NodeCache) -> RawManifest:
    """By digest from the cache when it is there; what the repository sends is kept."""
    cached = _cached_manifest(cache, reference)
    if cached:
        return cached
    manifest = repository.manifest(reference)
    cache.store_blob(manifest.descriptor.digest, manifest.raw)
    return manifest


def _cached_manifest(cache: NodeCache, reference: str) -> RawManifest | None:
    digest = as_digest(reference)
    raw = cache.load_blob(digest) if digest is not None else None
    return _raw_manifest(digest, raw) if digest is not None and raw is not None else None


def _raw_manifest(digest: Digest, raw: bytes) -> RawManifest:
    # The media type only tells an index from a manifest, and the JSON says that too.
    return RawManifest(Descriptor("", digest, len(raw)), raw)


def _remembered(cache: NodeCache, key: str) -> RawManifest | None:
    value = cache.load_tag(key)
    if value is None:
        return None
    try:
        digest = parse_digest(json.loads(value)["digest"])
        manifest = _cached_manifest(cache, digest)
        return manifest if manifest and manifest_kind(manifest).is_snapshot else None
    except (ValueError, KeyError, TypeError, ImgsnapError):
        return None
