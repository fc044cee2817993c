"""Garbage collection of a store: what no tag leads to goes, and only if it is ours.

Roots are the tags (with `keep_tags`, of snapshots only those that match), and in a layout every
manifest that is not ours. Kept is what they reach: entries of indexes, referrers of kept manifests,
the snapshots that converted images name, the converted layers of kept snapshots, and all their
blobs. Everything else of ours is a candidate, and is deleted once it has been one for the grace
period: a manifest before its blobs, so that a crash leaves blobs without a manifest and never the
reverse.

A conversion may be about to use a pack that nothing refers to yet. In a layout, writers hold a lock
that collecting takes for itself. In a registry, the grace period is one guard; the candidates are
looked for again just before they are deleted; and a conversion asks for every pack right before it
publishes the manifest that lists it. A registry's blobs are left to its own garbage collection.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from imgsnap.blockstore.snapshot_manifest import stands_for
from imgsnap.digest import Digest, digest_hex, parse_digest, sha256_digest
from imgsnap.errors import FormatError, ImgsnapError, InvalidArgument, NotFound
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX, parse_config
from imgsnap.oci import media_types
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.manifest import Document, ImageIndex, ImageManifest, parse_document
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.repository import RawManifest

OURS = "application/vnd.imgsnap."
"""Artifact types of ours begin so; nothing else is ever deleted."""
_FALLBACK = "sha256-"
_HEX = 64

Collectable = LayoutRepository | RegistryRepository


@dataclass(frozen=True, slots=True)
class Options:
    """What may go."""

    grace_s: float
    keep_tags: tuple[str, ...] = ()  # globs; () keeps every tag
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A manifest of ours that no root leads to."""

    digest: Digest
    tags: tuple[str, ...]
    document: Document = field(repr=False)

    @property
    def kind(self) -> str:
        artifact = self.document.artifact_type.removeprefix(OURS).partition(".")[0]
        return "index" if isinstance(self.document, ImageIndex) else artifact or "image"


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` deleted, or would delete."""

    manifests: tuple[Candidate, ...]
    waiting: tuple[Candidate, ...]  # not long enough without a use
    kept: int  # manifests
    blobs: int
    bytes: int  # of blobs; 0 for registries, which free them later

    @property
    def packs(self) -> frozenset[Digest]:
        """Packs that deleted manifests list: they may be gone."""
        return frozenset(
            blob.digest
            for item in self.manifests
            if isinstance(item.document, ImageManifest)
            for blob in item.document.layers
            if blob.media_type == media_types.PACK
        )


def collect(
    repository: Collectable,
    options: Options,
    *,
    state: Path,
    now: Callable[[], float] = time.time,
) -> Collected:
    """Deletes garbage. `state` keeps since when a registry's manifests have been candidates.

    Raises Busy while a conversion writes to the layout, Unsupported for a registry that does not
    delete, and what the repository raises.
    """
    if isinstance(repository, LayoutRepository):
        with repository.files.alone():
            return _collect_layout(repository, options, now())
    return _collect_registry(repository, options, state, now())


# What is reachable ------------------------------------------------------------------------------


class _Graph:
    """The manifests of a repository, read once each."""

    def __init__(self, repository: Collectable) -> None:
        self._repository = repository
        self.documents: dict[Digest, Document] = {}
        self.raw: dict[Digest, RawManifest] = {}

    def load(self, reference: str) -> Digest | None:
        """A manifest's digest; None when it is not here. Raises FormatError for a broken one."""
        try:
            raw = self._repository.manifest(reference)
        except NotFound:
            return None
        digest = raw.descriptor.digest
        self.raw[digest] = raw
        self.documents[digest] = parse_document(raw.raw, media_type=raw.descriptor.media_type)
        return digest

    def ours(self, digest: Digest) -> bool:
        document = self.documents[digest]
        return document.artifact_type.startswith(OURS) or self.snapshot(digest) is not None

    def snapshot(self, digest: Digest) -> Digest | None:
        """The snapshot that a converted image names."""
        document = self.documents[digest]
        return None if isinstance(document, ImageIndex) else stands_for(document)

    def load_entries(self) -> None:
        """Reads what the indexes of ours that were found list: nothing else leads to a converted
        image in a registry."""
        for digest, document in tuple(self.documents.items()):
            if isinstance(document, ImageIndex) and self.ours(digest):
                for entry in document.manifests:
                    if entry.digest not in self.documents:
                        self.load(entry.digest)


def _reachable(repository: Collectable, options: Options) -> tuple[set[Digest], list[Candidate]]:
    """The digests that are kept, and the candidates."""
    graph = _Graph(repository)
    tags: dict[Digest, list[str]] = {}
    roots: list[Digest] = []
    layers: dict[str, Digest] = {}
    for tag in repository.tags():
        if _is_fallback(tag) and isinstance(repository, RegistryRepository):
            continue
        digest = graph.load(tag)
        if digest is None:
            continue
        tags.setdefault(digest, []).append(tag)
        if tag.startswith(media_types.LAYER_TAG_PREFIX) and graph.ours(digest):
            layers[tag] = digest
        elif not graph.ours(digest) or _matches(tag, options.keep_tags):
            roots.append(digest)
    for digest in _untagged(repository, graph):
        if not graph.ours(digest):
            roots.append(digest)
    kept = _close(repository, graph, roots)
    needed = {tag for digest in kept for tag in _layer_tags(repository, graph, digest)}
    kept |= _close(repository, graph, [layers[tag] for tag in layers if tag in needed])
    graph.load_entries()
    candidates = [
        Candidate(digest, tuple(tags.get(digest, ())), document)
        for digest, document in graph.documents.items()
        if digest not in kept and graph.ours(digest)
    ]
    return kept, sorted(candidates, key=lambda item: (item.tags, item.digest))


def _matches(tag: str, globs: Sequence[str]) -> bool:
    return not globs or any(fnmatchcase(tag, glob) for glob in globs)


def _is_fallback(tag: str) -> bool:
    return tag.startswith(_FALLBACK) and len(tag) == len(_FALLBACK) + _HEX


def _untagged(repository: Collectable, graph: _Graph) -> Iterable[Digest]:
    """Manifests that are here without a tag, as far as the place can tell."""
    if isinstance(repository, LayoutRepository):
        for entry in repository.listed():
            digest = graph.load(entry.digest)
            if digest is not None:
                yield digest
        return
    for tag in repository.tags(_FALLBACK):
        if not _is_fallback(tag):
            continue
        with suppress(InvalidArgument, FormatError):
            subject = parse_digest(tag.replace("-", ":", 1))
            for entry in repository.referrers(subject, ""):
                digest = graph.load(entry.digest)
                if digest is not None:
                    yield digest


def _close(repository: Collectable, graph: _Graph, roots: Iterable[Digest]) -> set[Digest]:
    """The roots and all that they lead to: entries of indexes, and referrers."""
    kept: set[Digest] = set()
    open_: list[Digest] = list(roots)
    while open_:
        digest = open_.pop()
        if digest in kept:
            continue
        if digest not in graph.documents and graph.load(digest) is None:
            continue
        kept.add(digest)
        document = graph.documents[digest]
        if isinstance(document, ImageIndex):
            open_ += [entry.digest for entry in document.manifests]
        named = graph.snapshot(digest)
        if named is not None:
            open_.append(named)
        open_ += [entry.digest for entry in repository.referrers(digest, "")]
    return kept


def _layer_tags(repository: Collectable, graph: _Graph, digest: Digest) -> list[str]:
    """The tags of the converted layers that a snapshot was made of."""
    document = graph.documents[digest]
    if not isinstance(document, ImageManifest) or document.config.media_type != media_types.CONFIG:
        return []
    config = parse_config(repository.blob(document.config, size_max=CONFIG_SIZE_MAX))
    rules_id = sha256_digest(config.rules.encode())[7:15]
    return [
        f"{media_types.LAYER_TAG_PREFIX}{rules_id}-{digest_hex(extent.diff_id)}"
        for extent in config.extents
    ]


# Layouts ----------------------------------------------------------------------------------------


def _collect_layout(layout: LayoutRepository, options: Options, now: float) -> Collected:
    kept, candidates = _reachable(layout, options)
    files = dict(layout.files.blobs())

    def old(name: str) -> bool:
        return now - files[name].st_mtime >= options.grace_s

    dead = [item for item in candidates if old(digest_hex(item.digest))]
    waiting = [item for item in candidates if not old(digest_hex(item.digest))]
    gone = {item.digest for item in dead}
    used = _used_names(layout, gone, kept | {item.digest for item in waiting})
    unused = [name for name in files if len(name) == _HEX and name not in used and old(name)]
    size = sum(files[name].st_size for name in unused)
    if not options.dry_run:
        layout.delete_manifests(gone)
        for name in unused:
            layout.files.remove_blob(name)
    return Collected(tuple(dead), tuple(waiting), len(kept), len(unused), size)


def _used_names(
    layout: LayoutRepository, gone: Collection[Digest], kept: Iterable[Digest]
) -> set[str]:
    """Names of the blobs that a manifest which stays needs, itself among them.

    Raises what a manifest that cannot be read raises: without it nothing is known to be unused.
    """
    listed = {entry.digest for entry in layout.listed()} - set(gone)
    used: set[str] = set()
    open_ = [*listed, *kept]
    while open_:
        digest = open_.pop()
        name = digest_hex(digest)
        if name in used:
            continue
        used.add(name)
        try:
            raw = layout.manifest(digest)
        except NotFound:
            continue
        document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
        if isinstance(document, ImageIndex):
            open_ += [entry.digest for entry in document.manifests if entry.digest not in gone]
        else:
            used.add(digest_hex(document.config.digest))
            used.update(digest_hex(blob.digest) for blob in document.layers)
    return used


# Registries -------------------------------------------------------------------------------------


def _collect_registry(
    registry: RegistryRepository, options: Options, state: Path, now: float
) -> Collected:
    kept, candidates = _reachable(registry, options)
    since = _read_state(state)
    since = {item.digest: min(since.get(item.digest, now), now) for item in candidates}
    dead = [item for item in candidates if now - since[item.digest] >= options.grace_s]
    waiting = [item for item in candidates if item not in dead]
    if not options.dry_run:
        # A conversion may have begun to use one of them since the first look.
        still = {item.digest for item in _reachable(registry, options)[1]} if dead else set()
        dead = [item for item in dead if item.digest in still]
        _delete(registry, dead)
        gone = {item.digest for item in dead}
        _write_state(state, {d: t for d, t in since.items() if d not in gone})
    return Collected(tuple(dead), tuple(waiting), len(kept), 0, 0)


def _delete(registry: RegistryRepository, dead: Sequence[Candidate]) -> None:
    """Indexes first, then snapshots, then layers: what refers goes before what is referred to."""
    order = {"index": 0, "snapshot": 1}
    for item in sorted(dead, key=lambda item: order.get(item.kind, 2)):
        registry.delete_manifest(item.digest)
        subject = item.document.subject
        if subject is not None:
            registry.forget_referrers(subject.digest, {item.digest})


def _read_state(path: Path) -> dict[Digest, float]:
    """Since when manifests have been candidates; a damaged record begins anew."""
    try:
        value = json.loads(path.read_text())
        return {parse_digest(key): float(seconds) for key, seconds in value.items()}
    except (OSError, ValueError, AttributeError, TypeError, ImgsnapError):
        return {}


def _write_state(path: Path, since: dict[Digest, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(since))
    temporary.replace(path)
