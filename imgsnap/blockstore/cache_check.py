"""`imgsnap cache check`: reads everything in the node cache and says what is damaged.

The ids of an extent's chunks come from the cached chunk maps, so no repository is asked. Reading
only, unless `repair`: then a damaged chunk's presence byte is cleared, a damaged file is moved to
quarantine/, and an extent that no map describes is removed; all of it is fetched again on next use.
A process that has verified a chunk before it was damaged goes on with what it has in memory.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from imgsnap.blockstore import lease
from imgsnap.blockstore.cache_pins import pins
from imgsnap.blockstore.cache_usage import Entry, chunk_maps, scan
from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import FOOTER, NodeCache, remove_tree, sealed_intact
from imgsnap.digest import Digest, chunk_id, parse_digest
from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.formats.chunk_map import ZERO_PACK, Extent
from imgsnap.units import BLOCK_SIZE

DAMAGED, UNVERIFIABLE = "damaged", "unverifiable"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    kind: str
    name: str
    state: str  # DAMAGED or UNVERIFIABLE
    problem: str
    rows: tuple[int, ...] = ()  # of an extent's damaged chunks, when its files are whole


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What `check_cache` read, and found."""

    entries: int
    chunks: int
    bytes: int  # that were hashed
    findings: tuple[Finding, ...]


class _Hashed:
    def __init__(self, advance: Callable[[int], None]) -> None:
        self.chunks = self.bytes = 0
        self._advance = advance

    def add(self, size: int, chunks: int = 0) -> None:
        self.bytes += size
        self.chunks += chunks
        self._advance(size)


def check_cache(
    cache: NodeCache, *, repair: bool = False, advance: Callable[[int], None] = lambda size: None
) -> CacheReport:
    """Verifies every entry; `advance` gets the bytes that were hashed."""
    extents: dict[str, Extent] = {}
    for _, chunk_map in chunk_maps(cache):
        if chunk_map is not None:
            extents.update((extent.id, extent) for extent in chunk_map.extents)
    hashed = _Hashed(advance)
    findings: list[Finding] = []
    entries = scan(cache)
    for entry in entries:
        finding = _check(entry, extents, hashed)
        if finding is not None:
            findings.append(finding)
            if repair:
                _repair(cache, entry, finding, extents.get(entry.name))
    for path in pins(cache).damaged:
        findings.append(Finding("pins", path.name, DAMAGED, "protects nothing"))
        if repair:
            cache.quarantine(path, "a pin that cannot be read")
    return CacheReport(len(entries), hashed.chunks, hashed.bytes, tuple(findings))


def _check(entry: Entry, extents: dict[str, Extent], hashed: _Hashed) -> Finding | None:
    if entry.kind == "extents":
        return _check_extent(entry, extents.get(entry.name), hashed)
    verify = {
        "blobs": _named_by_sha256,
        "packs": _named_by_sha256,
        "boot-packs": _named_by_sha256,
        "chunk-maps": _sealed,
        "metadata": _sealed,
        "direct": _sealed,
        "tags": _sealed,
    }.get(entry.kind)
    if verify is None:
        return None
    try:
        name = parse_digest(f"sha256:{entry.name}")
        intact = verify(entry.path, name)
        problem = "its bytes do not match its name or sum"
    except (OSError, InvalidArgument) as error:
        intact, problem = not entry.path.exists(), str(error)
    hashed.add(entry.bytes)
    return None if intact else Finding(entry.kind, entry.name, DAMAGED, problem)


def _named_by_sha256(path: Path, name: Digest) -> bool:
    import hashlib

    with path.open("rb", buffering=0) as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest() == name


def _sealed(path: Path, name: Digest) -> bool:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size - FOOTER.size
        return size >= 0 and sealed_intact(file.fileno(), size, name)


def _check_extent(entry: Entry, extent: Extent | None, hashed: _Hashed) -> Finding | None:
    fds: list[int] = []
    try:
        for name in ("data", "present"):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fds.append(os.open(entry.path / name, flags))
        data, present = fds
        if not lease.hold(data):
            return None  # being evicted
        if extent is None:
            problem = "no cached chunk map describes it"
            return Finding(entry.kind, entry.name, UNVERIFIABLE, problem)
        problem = _fits(data, present, extent)
        if problem:
            return Finding(entry.kind, entry.name, DAMAGED, problem)
        bad = tuple(_damaged_rows(data, present, extent, hashed))
    except OSError as error:
        if not os.path.lexists(entry.path):
            return None
        return Finding(entry.kind, entry.name, DAMAGED, str(error))
    finally:
        for fd in fds:
            os.close(fd)
    if not bad:
        return None
    problem = f"{len(bad)} of its chunks, the first is {extent.chunk_id(bad[0]).hex()}"
    return Finding(entry.kind, entry.name, DAMAGED, problem, bad)


def _fits(data: int, present: int, extent: Extent) -> str:
    """Why the files are not this extent's, or ""."""
    header = PresenceHeader(len(extent), extent.total_blocks, extent.id)
    try:
        if PresenceHeader.parse(os.pread(present, header.SIZE, 0)) != header:
            return "the presence map is another extent's"
    except FormatError as error:
        return str(error)
    if os.fstat(present).st_size != header.SIZE + len(extent):
        return "the presence map has another length"
    if os.fstat(data).st_size != extent.total_blocks * BLOCK_SIZE:
        return "the data file has another length"
    return ""


def _damaged_rows(data: int, present: int, extent: Extent, hashed: _Hashed) -> Iterator[int]:
    """The chunks that the map says are here, and whose bytes are not theirs."""
    states = os.pread(present, len(extent), PresenceHeader.SIZE)
    offset = 0
    buffer = memoryview(bytearray(max(extent.blocks, default=0) * BLOCK_SIZE))
    for row, (blocks, state) in enumerate(zip(extent.blocks, states, strict=True)):
        size = blocks * BLOCK_SIZE
        if state or extent.pack[row] == ZERO_PACK:
            view = buffer[:size]
            count = os.preadv(data, (view,), offset)
            hashed.add(size, 1)
            if count != size or chunk_id(view) != extent.chunk_id(row):
                yield row
            elif state > 1:
                yield row  # a damaged byte, which readers take for "absent"
        offset += size


def _repair(cache: NodeCache, entry: Entry, finding: Finding, extent: Extent | None) -> None:
    if finding.state == UNVERIFIABLE:
        _remove(cache, entry.path)
    elif finding.rows and extent is not None:
        _clear(entry.path, finding.rows, extent)
    else:
        cache.quarantine(entry.path, finding.problem)


def _clear(directory: Path, rows: Iterable[int], extent: Extent) -> None:
    """Marks chunks as absent. Their bytes stay, but for chunks of zeros, which are always here."""
    starts = list(accumulate(extent.blocks, initial=0))
    with (
        suppress(OSError),
        (directory / "present").open("r+b", buffering=0) as present,
        (directory / "data").open("r+b", buffering=0) as data,
    ):
        for row in rows:
            os.pwrite(present.fileno(), b"\x00", PresenceHeader.SIZE + row)
            if extent.pack[row] == ZERO_PACK:
                zeros = bytes(extent.blocks[row] * BLOCK_SIZE)
                os.pwrite(data.fileno(), zeros, starts[row] * BLOCK_SIZE)


def _remove(cache: NodeCache, directory: Path) -> None:
    """Takes the name away first: who has the files open goes on with them."""
    moved = cache.temporary_path()
    with suppress(OSError):
        directory.rename(moved)
        remove_tree(moved)
