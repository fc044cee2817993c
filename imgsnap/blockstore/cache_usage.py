"""What the node cache holds: allocated bytes by entry, by kind and by snapshot.

Bytes are those the file system has allocated (st_blocks), so that the holes of sparse files count
nothing and the file system's own overhead counts. A file that a process still has open after its
name is gone is not seen.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore import lease
from imgsnap.blockstore.cache_pins import Part, pins
from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import NodeCache, allocated, without_footer
from imgsnap.blockstore.snapshot_manifest import SnapshotManifest, snapshot_manifest
from imgsnap.digest import Digest, digest_hex, sha256_digest
from imgsnap.errors import ImgsnapError
from imgsnap.formats.chunk_map import ZERO_PACK, ChunkMap
from imgsnap.formats.chunk_map_codec import decode
from imgsnap.formats.snapshot_config import CONFIG_SIZE_MAX, SnapshotConfig, parse_config
from imgsnap.oci.repository import MANIFEST_SIZE_MAX, Descriptor, RawManifest
from imgsnap.units import BLOCK_SIZE

KINDS = (
    "extents",
    "direct",
    "packs",
    "boot-packs",
    "metadata",
    "chunk-maps",
    "blobs",
    "tags",
    "pins",
    "quarantine",
    "tmp",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the cache, or one extent's directory."""

    kind: str
    name: str
    path: Path
    bytes: int  # allocated
    used: float  # seconds since the epoch, of the last use

    @property
    def part(self) -> Part:
        return Part(self.kind, self.name)


def scan(cache: NodeCache) -> list[Entry]:
    """Every entry, in no order; what disappears meanwhile is left out."""
    return [entry for kind in KINDS for entry in _scan_kind(cache, kind)]


def _scan_kind(cache: NodeCache, kind: str) -> Iterable[Entry]:
    try:
        found = list(os.scandir(cache.root / kind))
    except OSError:
        return
    for item in found:
        path = Path(item.path)
        try:
            if item.is_dir(follow_symlinks=False):
                yield Entry(kind, item.name, path, allocated(path), _use(path))
            else:
                status = item.stat(follow_symlinks=False)
                yield Entry(kind, item.name, path, status.st_blocks * 512, status.st_mtime)
        except FileNotFoundError:
            continue


def _use(directory: Path) -> float:
    """Of an extent: its presence map keeps the time."""
    try:
        return (directory / "present").lstat().st_mtime
    except OSError:
        return directory.lstat().st_mtime


def by_kind(entries: Iterable[Entry]) -> dict[str, int]:
    """Allocated bytes of each kind."""
    found: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for entry in entries:
        found[entry.kind] += entry.bytes
    return dict(found)


@dataclass(frozen=True, slots=True)
class CachedSnapshot:
    """A snapshot whose manifest is in the cache. Bytes are allocated ones unless they say so."""

    manifest: Digest
    names: tuple[str, ...]  # repository and tag, as they were asked for
    own: int  # of parts that no other cached snapshot has
    shared: int  # of parts that others have as well
    present: int  # bytes of the device that are here, holes included
    size: int  # bytes of the device
    used: float
    holders: tuple[str, ...]  # of its pins
    in_use: bool  # a process has one of its extents open

    @property
    def complete(self) -> float:
        """From 0 to 1."""
        return self.present / self.size if self.size else 1.0


@dataclass(frozen=True, slots=True)
class _Known:
    manifest: SnapshotManifest
    config: SnapshotConfig | None
    chunk_map: ChunkMap | None

    @property
    def parts(self) -> frozenset[Part]:
        blobs = [self.manifest.digest, self.manifest.config.digest]
        if self.manifest.image_config is not None:
            blobs.append(self.manifest.image_config.digest)
        found = {Part("blobs", digest_hex(digest)) for digest in blobs}
        found.add(Part("chunk-maps", digest_hex(self.manifest.chunk_map.digest)))
        found.add(Part("direct", digest_hex(self.manifest.config.digest)))
        found.update(Part("packs", digest_hex(digest)) for digest in self.manifest.packs)
        if self.config is not None:
            found.add(Part("metadata", digest_hex(self.config.metadata_digest)))
            found.update(Part("extents", extent.extent_id) for extent in self.config.device_extents)
        return frozenset(found)


def snapshots(cache: NodeCache, entries: Iterable[Entry]) -> list[CachedSnapshot]:
    """The snapshots that the cache knows of, the least recently used first.

    Reads without marking anything as used. Damaged parts count as absent.
    """
    present = {entry.part: entry for entry in entries}
    known = [_known(cache, manifest) for manifest in _manifests(cache)]
    users = Counter(part for snapshot in known for part in snapshot.parts)
    names = _names(cache)
    pinned = pins(cache).pins
    found = []
    for snapshot in known:
        digest = snapshot.manifest.digest
        mine = [present[part] for part in snapshot.parts if part in present]
        extents = [entry for entry in mine if entry.kind == "extents"]
        here, size = _progress(cache, snapshot)
        found.append(
            CachedSnapshot(
                manifest=digest,
                names=tuple(sorted(names.get(digest, ()))),
                own=sum(entry.bytes for entry in mine if users[entry.part] == 1),
                shared=sum(entry.bytes for entry in mine if users[entry.part] > 1),
                present=here,
                size=size,
                used=max((entry.used for entry in extents or mine), default=0.0),
                holders=tuple(sorted(pin.holder for pin in pinned if pin.manifest == digest)),
                in_use=any(_leased(entry.path / "data") for entry in extents),
            )
        )
    return sorted(found, key=lambda item: (item.used, item.manifest))


def chunk_maps(cache: NodeCache) -> Iterable[tuple[Path, ChunkMap | None]]:
    """Every cached chunk map; None for one that is damaged or cannot be read."""
    for path in sorted((cache.root / "chunk-maps").iterdir()):
        try:
            content = without_footer(Digest(f"sha256:{path.name}"), path.read_bytes())
            yield path, decode(content) if content is not None else None
        except (OSError, ImgsnapError):
            yield path, None


def _manifests(cache: NodeCache) -> Iterable[SnapshotManifest]:
    for path in sorted((cache.root / "blobs").iterdir()):
        raw = _blob(path, MANIFEST_SIZE_MAX)
        if raw is None or not raw.startswith(b"{"):
            continue
        digest = sha256_digest(raw)
        try:
            yield snapshot_manifest(RawManifest(Descriptor("", digest, len(raw)), raw))
        except ImgsnapError:
            continue  # a config, an image's manifest, an index


def _blob(path: Path, size_max: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            raw = file.read(size_max + 1)
    except OSError:
        return None
    return raw if len(raw) <= size_max and digest_hex(sha256_digest(raw)) == path.name else None


def _known(cache: NodeCache, manifest: SnapshotManifest) -> _Known:
    raw = _blob(cache.root / "blobs" / digest_hex(manifest.config.digest), CONFIG_SIZE_MAX)
    config: SnapshotConfig | None = None
    chunk_map: ChunkMap | None = None
    try:
        config = parse_config(raw) if raw is not None else None
        path = cache.root / "chunk-maps" / digest_hex(manifest.chunk_map.digest)
        content = without_footer(Digest(f"sha256:{path.name}"), path.read_bytes())
        chunk_map = decode(content) if content is not None else None
    except (OSError, ImgsnapError):
        pass
    return _Known(manifest, config, chunk_map)


def _progress(cache: NodeCache, snapshot: _Known) -> tuple[int, int]:
    """Bytes of the device that are here, and all of them."""
    if snapshot.config is None or snapshot.chunk_map is None:
        return 0, snapshot.config.device_blocks * BLOCK_SIZE if snapshot.config else 0
    metadata = cache.root / "metadata" / digest_hex(snapshot.config.metadata_digest)
    blocks = snapshot.config.metadata_blocks if metadata.exists() else 0
    for extent in snapshot.chunk_map.extents:
        try:
            known = (cache.extent_directory(extent.id) / "present").read_bytes()
        except OSError:
            known = b""
        here = known[PresenceHeader.SIZE :].ljust(len(extent), b"\0")
        blocks += sum(
            count
            for count, on_disk, pack in zip(extent.blocks, here, extent.pack, strict=False)
            if on_disk or pack == ZERO_PACK
        )
    return blocks * BLOCK_SIZE, snapshot.config.device_blocks * BLOCK_SIZE


def _names(cache: NodeCache) -> dict[Digest, set[str]]:
    found: dict[Digest, set[str]] = {}
    for path in (cache.root / "tags").iterdir():
        try:
            content = without_footer(Digest(f"sha256:{path.name}"), path.read_bytes())
            value = json.loads(content or b"")
            found.setdefault(value["digest"], set()).add(str(value["name"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _leased(path: Path) -> bool:
    """Whether a process has leased the file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not lease.claim(fd)
    finally:
        os.close(fd)
