"""The block reader: a snapshot's device as bytes, from its metadata, its caches and its fetcher."""

import logging
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from imgsnap.blockstore.completion import Completion
from imgsnap.blockstore.content import FetchDone
from imgsnap.blockstore.extent_cache import ExtentPool
from imgsnap.blockstore.fetch_queue import Batch, ChunkSource, Priority
from imgsnap.blockstore.fetcher import Fetcher
from imgsnap.blockstore.read_options import DEADLINE_S, WINDOW_MAX, Prefetch
from imgsnap.blockstore.readahead import Readahead
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.blockstore.stalls import PACK_SOURCE, StallLog, Waiting
from imgsnap.blockstore.statistics import Statistics
from imgsnap.errors import ImgsnapError, IntegrityError, InvalidArgument, Unavailable
from imgsnap.units import BLOCK_SIZE

if TYPE_CHECKING:
    from imgsnap.blockstore.boot_buffer import BootBuffer
    from imgsnap.blockstore.touches import TouchLog
    from imgsnap.formats.boot_pack import BootTable
    from imgsnap.formats.trace import Trace

READ_ATTEMPTS = 3
"""A chunk that is lost from the cache between its fetch and its use is fetched again this often."""
WARM_BATCH = 256
"""Chunks given to the prefetch queue at a time: some 64 MiB of the device, 20 MiB of packs."""
WARM_BATCHES = 5
"""Batches queued at a time, so that more than the largest window is."""
COMPLETE_CHECK_READS = 1024
"""How often the reader looks whether all chunks are here: a byte per chunk is counted."""
_WAIT_MARGIN_S = 5.0

_log = logging.getLogger(__name__)


class _Part(NamedTuple):
    """A run of the device: an extent, or the metadata when there is no source. Bytes."""

    base: int
    end: int
    source: ChunkSource | None


class _Span(NamedTuple):
    """The piece of one part that a read covers; `offset` is relative to the part.

    A NamedTuple because one is made for every read: a frozen dataclass costs five times as much,
    and 0.6 ms instead of 0.1 to define while a mount is waiting for the imports.
    """

    source: ChunkSource | None
    offset: int
    length: int

    @property
    def rows(self) -> range:
        if self.source is None:
            return range(0)
        return self.source.cache.rows(self.offset, self.offset + self.length)


class BlockReader:
    """Reads of one snapshot's device. Safe for threads; offsets and lengths are bytes."""

    def __init__(
        self,
        snapshot: Snapshot,
        pool: ExtentPool,
        fetcher: Fetcher,
        *,
        readahead_max: int = WINDOW_MAX,
        deadline_s: float = DEADLINE_S,
        prefetch: Prefetch = Prefetch.OFF,
        prefetch_rate: int = 0,
        boot: "BootBuffer | None" = None,
        touches: "TouchLog | None" = None,
    ) -> None:
        """`boot` holds blocks of a boot pack; `touches` is told what is read."""
        self.size = snapshot.size
        self.statistics = Statistics()
        self.stalls = StallLog()
        if boot is not None:
            self.statistics.pack = boot.counts
        self._boot = boot
        self._touches = touches
        self._snapshot = snapshot
        self._metadata = snapshot.metadata.fileno()
        self._pool = pool
        self._fetcher = fetcher
        self._deadline_s = deadline_s
        self._parts = _parts(snapshot, pool, self.statistics)
        self._bases = [part.base for part in self._parts]
        sources = [part.source for part in self._parts if part.source is not None]
        self._completion = Completion(sources, fetcher, self.statistics, prefetch, prefetch_rate)
        self._readahead = (
            Readahead(self.size, readahead_max, fetcher.window) if readahead_max else None
        )
        self._complete = False

    @property
    def complete(self) -> bool:
        """Whether every byte is local and verified. Stays true once it is."""
        if not self._complete:
            self._complete = all(
                part.source.cache.complete for part in self._parts if part.source is not None
            )
        return self._complete

    @property
    def local(self) -> bool:
        """Whether nothing would have to be fetched now, as far as the presence maps say."""
        return all(part.source.cache.local for part in self._parts if part.source is not None)

    # Reading ---------------------------------------------------------------------------------

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fills `view` if all its bytes are local and verified; else changes it or not, and says
        False. The range must lie inside the device. Never waits for the network."""
        length = len(view)
        if self._touches is not None:
            self._touches.note(offset, length)
        if self._readahead is not None and not self._complete:
            self._read_ahead(offset, length)
        part = self._parts[bisect_right(self._bases, offset) - 1]
        if offset + length <= part.end:  # nearly always: no generator, no slices
            if not self._copy(part.source, offset - part.base, view):
                return False
        else:
            done = 0
            for span in self._spans(offset, length):
                if not self._copy(span.source, span.offset, view[done : done + span.length]):
                    return False
                done += span.length
        self.statistics.hits += 1
        if not self.statistics.hits % COMPLETE_CHECK_READS:
            _ = self.complete  # once it is, readahead's bookkeeping ends
        return True

    def fetch(self, offset: int, length: int, done: FetchDone) -> None:
        """Brings a range in and calls `done` once, from this thread or a fetcher's."""
        self.statistics.misses += 1
        waiting = self.stalls.begin(offset, length, done)
        if self._boot is not None and self._boot.pending:
            self._boot.wait(0, lambda: self._fetch(offset, length, waiting, READ_ATTEMPTS))
        else:
            self._fetch(offset, length, waiting, READ_ATTEMPTS)
        if self._readahead is not None and self._completion.adaptive:
            self._readahead.brought(self._completion.brought)
        self._completion.waited()

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` at the end of the device.

        Raises Unavailable after the deadline, IntegrityError, and what the repository raises.
        """
        if offset < 0 or length < 0:
            raise InvalidArgument(f"read of {length} bytes at {offset}")
        length = min(length, max(0, self.size - offset))
        if not length:
            return b""
        buffer = bytearray(length)
        if self.read_into(memoryview(buffer), offset):
            return bytes(buffer)
        outcome: list[bytes | BaseException] = []
        arrived = threading.Event()

        def done(data: memoryview | None, error: BaseException | None) -> None:
            outcome.append(bytes(data) if data is not None else error or AssertionError())
            arrived.set()

        self.fetch(offset, length, done)
        if not arrived.wait(self._deadline_s + _WAIT_MARGIN_S):
            raise Unavailable(f"{length} bytes at {offset} did not arrive before the deadline")
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fetches and verifies every chunk; `progress` gets bytes done and bytes in total.

        Raises what the first failing fetch raises.
        """
        total = self.size
        done = self._snapshot.metadata_size
        pending: deque[tuple[Callable[[], None], int]] = deque()
        for source, rows in self._batches():
            size = sum(source.cache.place(row)[1] for row in rows)
            wanted = [(source, row) for row in source.cache.missing(rows)]
            pending.append((self._prefetch(wanted), size))
            while len(pending) >= WARM_BATCHES:
                done = _finish(pending, done, total, progress)
        while pending:
            done = _finish(pending, done, total, progress)

    def close(self) -> None:
        """Releases the extents. No read may be under way or begin later."""
        self._completion.stop()
        for part in self._parts:
            if part.source is not None:
                self._pool.release(part.source.cache)
        self._parts.clear()
        self._bases.clear()

    # Inside ----------------------------------------------------------------------------------

    def _spans(self, offset: int, length: int) -> Iterator[_Span]:
        end = offset + length
        number = bisect_right(self._bases, offset) - 1
        while offset < end:
            part = self._parts[number]
            stop = min(end, part.end)
            yield _Span(part.source, offset - part.base, stop - offset)
            offset, number = stop, number + 1

    def _copy(self, source: ChunkSource | None, offset: int, view: memoryview) -> bool:
        """Fills `view` from one part if its bytes are here; `offset` is relative to the part."""
        if source is None:
            self._copy_metadata(view, offset)
            return True
        if source.cache.read_into(view, offset):
            return True
        return self._boot is not None and self._copy_boot(self._boot, source, offset, view)

    def _copy_boot(
        self, boot: "BootBuffer", source: ChunkSource, offset: int, view: memoryview
    ) -> bool:
        """As `_copy`, where the boot pack has what the cache lacks, chunk by chunk."""
        cache = source.cache
        if boot.read_into(cache.id, offset, view):
            return True
        rows = cache.rows(offset, offset + len(view))
        if len(rows) == 1:
            return False
        for row in rows:
            low, high = _overlap(cache.place(row), offset, len(view))
            part = view[low - offset : high - offset]
            if not cache.read_into(part, low) and not boot.read_into(cache.id, low, part):
                return False
        return True

    def _copy_metadata(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._metadata, (view[done:],), offset + done)
            if not count:
                raise IntegrityError("the cached EROFS metadata was cut off while in use")
            done += count

    def _fetch(self, offset: int, length: int, done: Waiting, attempts: int) -> None:
        wanted, until = self._missing(offset, length)
        done.wants((source.cache.id, row) for source, row in wanted)

        def fetched(batch: Batch) -> None:
            if self._boot is None or batch.error is not None:
                arrived(batch)
            else:
                self._boot.wait(until, lambda: arrived(batch))

        def arrived(batch: Batch) -> None:
            done.served(batch.hosts)
            if batch.error is not None:
                done(None, batch.error)
                return
            try:
                buffer = self._assemble(batch, offset, length)
                if buffer is None and attempts > 1:
                    self._fetch(offset, length, done, attempts - 1)
                    return
            except (ImgsnapError, OSError) as error:
                done(None, error)
                return
            if buffer is None:
                done(None, IntegrityError("the cache keeps losing the chunks of this read"))
            else:
                if until:
                    done.served((PACK_SOURCE,))
                done(buffer, None)

        self._fetcher.fetch(wanted, fetched, deadline_s=self._deadline_s)

    def _missing(self, offset: int, length: int) -> tuple[list[tuple[ChunkSource, int]], int]:
        """The chunks to fetch for a read, and how much of the boot pack must arrive for the rest.

        A chunk of which the read wants only blocks that the pack brings is not fetched.
        """
        wanted: list[tuple[ChunkSource, int]] = []
        until = 0
        for span in self._spans(offset, length):
            if span.source is None:
                continue
            for row in span.source.cache.missing(span.rows):
                expected = self._expected(span, row)
                if expected is None:
                    wanted.append((span.source, row))
                else:
                    until = max(until, expected)
        return wanted, until

    def _expected(self, span: _Span, row: int) -> int | None:
        """`BootBuffer.until` for the part of a chunk that a span covers."""
        if self._boot is None or span.source is None:
            return None
        cache = span.source.cache
        low, high = _overlap(cache.place(row), span.offset, span.length)
        return self._boot.until(cache.id, low, high - low)

    def has_local(self, table: "BootTable") -> bool:
        """Whether the extent caches have all blocks of a boot pack, as far as is known."""
        caches = {p.source.cache.id: p.source.cache for p in self._parts if p.source is not None}
        return not any(
            cache.absent(cache.rows(run.first * BLOCK_SIZE, (run.first + run.blocks) * BLOCK_SIZE))
            for frame in table.frames
            for run in frame.runs
            if (cache := caches.get(table.extents[run.extent].id)) is not None
        )

    def trace(self) -> "Trace":
        """The first reads of the extents' blocks so far, in order; empty unless they are noted.

        Exact only when the kernel did not read ahead (`imgsnap trace`); else more than what was
        used. Safe at any time, from any thread.
        """
        from imgsnap.formats.trace import Touch, Trace

        numbers: dict[str, int] = {}
        touches: list[Touch] = []
        for first, count in self._touches.runs() if self._touches is not None else ():
            for span in self._spans(first * BLOCK_SIZE, count * BLOCK_SIZE):
                if span.source is not None:
                    extent = numbers.setdefault(span.source.cache.id, len(numbers))
                    block, size = span.offset // BLOCK_SIZE, span.length // BLOCK_SIZE
                    touches.append(Touch(extent, block, size))
        complete = self._touches is None or not self._touches.full
        return Trace(tuple(numbers), tuple(touches), complete)

    def _assemble(self, batch: Batch, offset: int, length: int) -> memoryview | None:
        """The bytes of a read whose chunks have arrived; None if one is missing all the same."""
        view = memoryview(bytearray(length))
        done = 0
        for span in self._spans(offset, length):
            target = view[done : done + span.length]
            if not (self._copy_held(span, target, batch) if batch.held else False) and (
                not self._copy(span.source, span.offset, target)
            ):
                return None
            done += span.length
        return view

    def _copy_held(self, span: _Span, view: memoryview, batch: Batch) -> bool:
        """As `_copy` where chunks may be in memory only; False when none of this span's is."""
        if span.source is None:
            return False
        cache = span.source.cache
        if not any((cache.id, row) in batch.held for row in span.rows):
            return False
        for row in span.rows:
            start, size = cache.place(row)
            low = max(start, span.offset)
            high = min(start + size, span.offset + span.length)
            target = view[low - span.offset : high - span.offset]
            held = batch.held.get((cache.id, row))
            if held is not None:
                target[:] = memoryview(held)[low - start : high - start]
            elif not self._copy(span.source, low, target):
                return False
        return True

    def _read_ahead(self, offset: int, length: int) -> None:
        # The metadata is here already; what follows it on the device is no continuation of it.
        if self._readahead is None or offset + length <= self._snapshot.metadata_size:
            return
        if self._boot is not None and self._boots(offset, length):
            return
        ahead = self._readahead.after(offset, length)
        if ahead is None:
            return
        start, end = ahead
        wanted = [
            (span.source, row)
            for span in self._spans(start, end - start)
            # A cache that cannot store would fetch these again when they are read.
            if span.source is not None and span.source.cache.storing
            for row in span.source.cache.absent(span.rows)
            if self._expected(span, row) is None
        ]
        if wanted:
            self._fetcher.hint(wanted, Priority.READAHEAD)

    def _boots(self, offset: int, length: int) -> bool:
        """Whether a read is, or may turn out to be, one that the boot pack answers: what follows
        it on the device was not read by the start that the pack was made of."""
        if self._boot is None or self._boot.pending:
            return self._boot is not None
        return all(
            span.source is None
            or self._boot.until(span.source.cache.id, span.offset, span.length) is not None
            for span in self._spans(offset, length)
        )

    def _batches(self) -> Iterator[tuple[ChunkSource, range]]:
        for part in self._parts:
            if part.source is not None:
                count = len(part.source.extent)
                for first in range(0, count, WARM_BATCH):
                    yield part.source, range(first, min(count, first + WARM_BATCH))

    def _prefetch(self, wanted: list[tuple[ChunkSource, int]]) -> Callable[[], None]:
        """Queues chunks; the result waits for them and raises what their fetch raised."""
        arrived = threading.Event()
        batches: list[Batch] = []

        def done(batch: Batch) -> None:
            batches.append(batch)
            arrived.set()

        # Nobody waits for a prefetch, and demand may hold it up for long: a wide deadline.
        deadline_s = self._deadline_s * 10
        self._fetcher.fetch(wanted, done, priority=Priority.PREFETCH, deadline_s=deadline_s)

        def wait() -> None:
            if not arrived.wait(deadline_s + _WAIT_MARGIN_S):
                raise Unavailable("the snapshot's chunks did not arrive before the deadline")
            if batches[0].error is not None:
                raise batches[0].error

        return wait


def _overlap(place: tuple[int, int], offset: int, length: int) -> tuple[int, int]:
    """Where a chunk (offset, size) and a range of its extent meet."""
    start, size = place
    return max(start, offset), min(start + size, offset + length)


def _finish(
    pending: deque[tuple[Callable[[], None], int]],
    done: int,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Waits for the oldest batch; the bytes that are here now."""
    wait, size = pending.popleft()
    wait()
    if progress is not None:
        progress(done + size, total)
    return done + size


def _parts(snapshot: Snapshot, pool: ExtentPool, statistics: Statistics) -> list[_Part]:
    """The device's parts in order; acquires the extents."""
    parts = [_Part(0, snapshot.metadata_size, None)]
    try:
        stated_extents = snapshot.config.device_extents
        for extent, stated in zip(snapshot.chunk_map.extents, stated_extents, strict=True):
            if not extent.total_blocks:
                continue
            source = ChunkSource(
                pool.acquire(extent),
                extent,
                snapshot.chunk_map,
                snapshot.manifest.packs,
                snapshot.repository,
                statistics,
            )
            base = stated.base_block * BLOCK_SIZE
            parts.append(_Part(base, base + extent.total_blocks * BLOCK_SIZE, source))
    except BaseException:
        for part in parts:
            if part.source is not None:
                pool.release(part.source.cache)
        raise
    return parts
