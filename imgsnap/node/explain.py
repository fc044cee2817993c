"""Explaining a start: the stalls of one device, with the files, layers and chunks they waited for.

The block server knows offsets, chunks and who sent them; paths, layers and sizes come from the
snapshot's metadata and chunk map in the node cache.
"""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from imgsnap.blockstore.block_paths import MetadataBlocks, Run, block_paths
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
from imgsnap.blockstore.stalls import PACK_SOURCE
from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, InvalidArgument, NotFound
from imgsnap.formats.chunk_map import ChunkMap, Extent
from imgsnap.formats.chunk_map_codec import decode
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.snapshot_config import SnapshotConfig, parse_config
from imgsnap.mount.records import MountRecords
from imgsnap.node import rpc
from imgsnap.node.client import attachment_of_mount
from imgsnap.node.containers import snapshot_mount_of
from imgsnap.node.places import NodePlaces
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.units import BLOCK_SIZE

METADATA = "metadata"
"""Stands for the path of blocks that belong to the EROFS metadata."""
HASH_TREE = "hash tree"
"""Stands for the path of blocks that belong to the dm-verity area."""
ADVISE_WAIT_S = 0.1
"""A boot pack is advised when readers were held up for this long by what no pack brought."""
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{6,64})")
_CALL_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Place:
    """Whom to ask about a device."""

    socket: Path  # of its block server
    attachment: str
    target: str | None  # the directory that shows it, when that was named
    direct: str = ""  # the digest of a snapshot that no server serves


@dataclass(frozen=True, slots=True)
class ChunkView:
    """A chunk that was missing."""

    id: str  # hex BLAKE3
    layer: str  # diffID
    bytes: int  # of its frame: what is fetched for it; 0 for zeros


@dataclass(frozen=True, slots=True)
class StallView:
    """One read that waited. Seconds and bytes; `at` counts from the opening of the device."""

    at: float
    wait: float
    offset: int
    length: int
    paths: tuple[str, ...]  # with a slash in front; METADATA, HASH_TREE; empty when not known
    more_paths: bool
    layers: tuple[str, ...]
    chunks: tuple[ChunkView, ...]
    chunk_count: int
    sources: tuple[str, ...]
    bytes: int  # of the frames of `chunks`
    error: str


@dataclass(frozen=True, slots=True)
class Totals:
    """All stalls, also those that the log had no room for; times in seconds."""

    stalls: int
    wait: float  # sum of the reads' waits
    held_up: float  # time in which at least one read waited, of the stalls that are listed
    errors: int
    dropped: int  # not listed
    buckets: tuple[int, ...]  # see stalls.BUCKETS_S


@dataclass(frozen=True, slots=True)
class BootPack:
    """What the boot pack did and what a new one could do: of the stalls that are listed."""

    statistics: Mapping[str, int]  # of the pack that was used; empty without one
    covered: int  # stalls that the pack alone ended
    missed: int  # stalls that waited for fetches
    missed_wait: float  # sum of their waits
    missed_held_up: float  # time in which at least one of them waited
    missed_bytes: int  # frames they waited for, each once
    missed_blocks: int  # of the device, read by them: what a pack would have to bring
    advised: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """The start of one snapshot on this machine."""

    snapshot: str  # manifest digest
    repository: str
    target: str | None
    direct: bool  # no server, so no stalls: everything was local
    opened: float | None  # seconds since the epoch; None when it is not open in its server
    size: int  # of the device, bytes
    reads: int
    hits: int
    misses: int
    statistics: Mapping[str, Any]
    totals: Totals
    boot_pack: BootPack
    stalls: tuple[StallView, ...]  # by time
    notes: tuple[str, ...]  # what is not known, and why

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Whom to ask -------------------------------------------------------------------------------------


def find(run_dir: Path, name: str) -> Place:
    """The device behind a mounted directory, a running container, or a digest that the daemon has
    attached.

    Raises NotFound, InvalidArgument for a digest or a container's id that is short of one.
    """
    run_dir = Path(os.path.realpath(run_dir))
    records = MountRecords(run_dir)
    record = records.get(records.id_of(Path(os.path.realpath(name))))
    record = record or snapshot_mount_of(records, name)
    if record is not None and record.direct:
        return Place(Path(), "", record.target, direct=record.manifest_digest)
    if record is not None:
        socket, attachment = attachment_of_mount(Path(record.target), run_dir)
        return Place(socket, attachment, record.target)
    digest = _DIGEST.fullmatch(name)
    if digest is None or Path(name).exists():
        raise NotFound(f"{name} is not a mounted snapshot", hint="list them with `imgsnap mounts`")
    return _of_digest(run_dir, digest[1])


def _of_digest(run_dir: Path, prefix: str) -> Place:
    socket = NodePlaces(run_dir).server.block_socket
    try:
        attached = rpc.call_again(socket, "list", timeout_s=_CALL_TIMEOUT_S)
    except rpc.NobodyListens as error:
        raise NotFound(
            "no daemon runs here, so no snapshot has a name",
            hint="name the directory that a snapshot is mounted on",
        ) from error
    ids = [item["id"] for item in attached if item["id"].startswith(prefix)]
    if len(ids) > 1:
        raise InvalidArgument(
            f"{prefix} is the beginning of {len(ids)} digests", hint="give more digits"
        )
    if not ids:
        raise NotFound(
            f"no snapshot {prefix} is attached", hint="see `imgsnap daemon status` and `mounts`"
        )
    return Place(socket, ids[0], None)


# The explanation ---------------------------------------------------------------------------------


def explain(run_dir: Path, name: str) -> Explanation:
    """Asks the block server and adds what the node cache knows. Raises what `find` raises,
    NotFound when nobody serves the mount any more, Unavailable."""
    place = find(run_dir, name)
    if place.direct:
        return _assemble({"manifest_digest": place.direct, "local": True}, place, [], [])
    try:
        answer = rpc.call_again(
            place.socket, "explain", timeout_s=_CALL_TIMEOUT_S, id=place.attachment
        )
    except rpc.NobodyListens as error:
        raise NotFound(f"nobody serves {name} any more", hint="unmount it and mount again") from (
            error
        )
    log = answer["log"]
    if log is None:
        return _assemble(answer, place, [], ["its server was replaced and nothing read since"])
    with ExitStack() as stack:
        cached, notes = _cached(answer, stack)
        return _assemble(answer, place, _stalls(log, cached, notes), notes)


@dataclass(frozen=True, slots=True)
class _Cached:
    """What the node cache has of a snapshot."""

    config: SnapshotConfig
    extents: Mapping[str, tuple[Extent, ChunkMap]]  # by id
    tree: ErofsReader


def _cached(answer: Mapping[str, Any], stack: ExitStack) -> tuple[_Cached | None, list[str]]:
    """None, and a note, when the cache has lost it or could never keep it."""
    missing = ["the node cache has not all of this snapshot's metadata: no files, no layers"]
    try:
        cache = NodeCache(Path(answer["cache"]))
        digest = Digest(answer["manifest_digest"])
        raw = cache.load_blob(digest)
        if raw is None:
            return None, missing
        manifest = snapshot_manifest(RawManifest(Descriptor("", digest, len(raw)), raw))
        raw_config = cache.load_blob(manifest.config.digest)
        raw_map = cache.load_chunk_map(manifest.chunk_map.digest)
        if raw_config is None or raw_map is None:
            return None, missing
        config, chunk_map = parse_config(raw_config), decode(raw_map)
        size = config.metadata_blocks * BLOCK_SIZE
        file = cache.open_metadata(config.metadata_digest, size)
        if file is None:
            return None, missing
        device = MetadataBlocks(stack.enter_context(file), size, config.total_blocks * BLOCK_SIZE)
        extents = {extent.id: (extent, chunk_map) for extent in chunk_map.extents}
        return _Cached(config, extents, ErofsReader(device)), []
    except (ImgsnapError, OSError) as error:
        return None, [f"{missing[0]} ({error})"]


def _stalls(
    log: Mapping[str, Any], cached: _Cached | None, notes: list[str]
) -> Sequence[StallView]:
    raw = sorted(log["stalls"], key=lambda stall: stall["at"])
    runs = [_run(stall) for stall in raw]
    found: Mapping[Run, Any] = {}
    if cached is not None:
        try:
            found = block_paths(cached.tree, runs)
        except ImgsnapError as error:
            notes.append(f"the files are not known: {error}")
    views = []
    for stall, run in zip(raw, runs, strict=True):
        chunks = _chunks(stall["chunks"], log["extents"], cached)
        here = found.get(run)
        paths = tuple("/" + _text(path) for path in here.paths) if here is not None else ()
        if cached is not None and run[0] < cached.config.metadata_blocks:
            paths = (METADATA, *paths)
        if cached is not None and run[1] > cached.config.total_blocks:
            paths = (*paths, HASH_TREE)
        views.append(
            StallView(
                at=stall["at"],
                wait=stall["wait"],
                offset=stall["offset"],
                length=stall["length"],
                paths=paths,
                more_paths=here is not None and here.more,
                layers=_layers(run, cached),
                chunks=chunks,
                chunk_count=stall["chunk_count"],
                sources=tuple(stall["sources"]),
                bytes=sum(chunk.bytes for chunk in chunks),
                error=stall["error"],
            )
        )
    return views


def _layers(run: Run, cached: _Cached | None) -> tuple[str, ...]:
    """The diffIDs of the extents that a run lies in, in device order."""
    if cached is None:
        return ()
    found = (
        extent.diff_id
        for extent in cached.config.extents
        if extent.base_block < run[1] and run[0] < extent.base_block + extent.blocks
    )
    return tuple(dict.fromkeys(found))


def _run(stall: Mapping[str, Any]) -> Run:
    return stall["offset"] // BLOCK_SIZE, -(-(stall["offset"] + stall["length"]) // BLOCK_SIZE)


def _text(path: bytes) -> str:
    """A name of the image for JSON: what is no UTF-8 is escaped."""
    return path.decode("utf-8", "backslashreplace")


def _chunks(
    keys: Sequence[Sequence[int]], extents: Sequence[str], cached: _Cached | None
) -> tuple[ChunkView, ...]:
    if cached is None:
        return ()
    views = []
    for number, row in keys:
        extent, chunk_map = cached.extents[extents[number]]
        place = chunk_map.place(extent, row)
        size = place.length if place is not None else 0
        views.append(ChunkView(extent.chunk_id(row).hex(), extent.diff_id, size))
    return tuple(views)


def _assemble(
    answer: Mapping[str, Any], place: Place, stalls: Sequence[StallView], notes: Sequence[str]
) -> Explanation:
    statistics = answer.get("statistics", {})
    log = answer.get("log") or {}
    totals = log.get("totals", {})
    hits, misses = statistics.get("hits", 0), statistics.get("misses", 0)
    return Explanation(
        snapshot=answer["manifest_digest"],
        repository=answer.get("repository", ""),
        target=place.target,
        direct=bool(place.direct),
        opened=log.get("opened"),
        size=answer.get("size", 0),
        reads=hits + misses,
        hits=hits,
        misses=misses,
        statistics=statistics,
        totals=Totals(
            stalls=totals.get("count", 0),
            wait=totals.get("seconds", 0.0),
            held_up=_union([(stall.at, stall.at + stall.wait) for stall in stalls]),
            errors=totals.get("errors", 0),
            dropped=totals.get("dropped", 0),
            buckets=tuple(totals.get("buckets", ())),
        ),
        boot_pack=_boot_pack(statistics.get("pack", {}), stalls),
        stalls=tuple(stalls),
        notes=tuple(notes),
    )


def _boot_pack(statistics: Mapping[str, int], stalls: Sequence[StallView]) -> BootPack:
    covered = [stall for stall in stalls if stall.sources == (PACK_SOURCE,)]
    missed = [stall for stall in stalls if stall.sources != (PACK_SOURCE,)]
    frames = {chunk.id: chunk.bytes for stall in missed for chunk in stall.chunks}
    blocks = _union([(stall.offset, stall.offset + stall.length) for stall in missed])
    held_up = _union([(stall.at, stall.at + stall.wait) for stall in missed])
    return BootPack(
        statistics=statistics,
        covered=len(covered),
        missed=len(missed),
        missed_wait=sum(stall.wait for stall in missed),
        missed_held_up=held_up,
        missed_bytes=sum(frames.values()),
        missed_blocks=round(blocks) // BLOCK_SIZE,
        advised=held_up >= ADVISE_WAIT_S,
    )


def _union(intervals: Sequence[tuple[float, float]]) -> float:
    """The length of what the intervals cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
