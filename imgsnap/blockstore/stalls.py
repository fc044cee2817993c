"""The stall log: the reads of one device that had to wait, for how long, and who ended the wait.

A read that is answered from local bytes is not here and costs nothing here. Times are seconds;
`at` counts from the opening of the device by this process.
"""

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

STALLS_MAX = 4096
"""Kept per device: a start has hundreds. The first ones stay, since they are the start; what comes
later is counted in the totals only."""
CHUNKS_MAX = 16
"""Chunks named per stall: a read of 1 MiB has some 8; more are counted."""
ERROR_LENGTH_MAX = 200
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper ends of the histogram's buckets, both ends as in Prometheus: a wait counts in the first
bucket that it does not exceed."""

CACHE_SOURCE = "cache"
"""The wait was ended by this machine: another reader's chunk, or a pack that is on disk whole."""
PACK_SOURCE = "pack"
"""The wait was ended by the boot pack."""

Done = Callable[[memoryview | None, BaseException | None], None]
ChunkKey = tuple[str, int]
"""Extent id and row."""


class Stall(NamedTuple):
    """One read that waited."""

    at: float
    wait: float
    offset: int  # of the device, bytes
    length: int
    chunks: tuple[ChunkKey, ...]  # that were missing; CHUNKS_MAX at most
    chunk_count: int  # all that were missing
    sources: tuple[str, ...]  # hosts, CACHE_SOURCE, PACK_SOURCE; none after an error
    error: str  # "" when the bytes came


class Waiting:
    """A read under way: call it when the read is answered, as the callback that it wraps."""

    __slots__ = ("_chunks", "_done", "_length", "_log", "_offset", "_sources", "_started")

    def __init__(self, log: "StallLog", offset: int, length: int, done: Done) -> None:
        self._log = log
        self._offset = offset
        self._length = length
        self._done = done
        self._chunks: dict[ChunkKey, None] = {}
        self._sources: set[str] = set()
        self._started = log.clock()

    def wants(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks were missing. May be called again when one was lost before its use."""
        self._chunks.update(dict.fromkeys(keys))

    def served(self, sources: Iterable[str]) -> None:
        """Who sent what the read was waiting for."""
        self._sources.update(sources)

    def __call__(self, data: memoryview | None, error: BaseException | None) -> None:
        chunks = tuple(self._chunks)
        sources = tuple(sorted(self._sources))
        if error is None and not sources:
            sources = (CACHE_SOURCE,)
        self._log.add(
            Stall(
                at=self._started - self._log.opened,
                wait=self._log.clock() - self._started,
                offset=self._offset,
                length=self._length,
                chunks=chunks[:CHUNKS_MAX],
                chunk_count=len(chunks),
                sources=sources,
                error="" if error is None else (str(error) or type(error).__name__),
            )
        )
        self._done(data, error)


class StallLog:
    """Safe for threads. `clock` is monotonic, `wall` tells seconds since the epoch."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        *,
        limit: int = STALLS_MAX,
    ) -> None:
        self.clock = clock
        self.opened = clock()
        self.opened_wall = wall()
        self._limit = limit
        self._lock = threading.Lock()
        # All below under the lock.
        self._kept: deque[Stall] = deque()
        self._buckets = [0] * (len(BUCKETS_S) + 1)
        self._count = 0
        self._seconds = 0.0
        self._errors = 0

    def begin(self, offset: int, length: int, done: Done) -> Waiting:
        """A read begins to wait; answer it by the result instead of `done`."""
        return Waiting(self, offset, length, done)

    def add(self, stall: Stall) -> None:
        """Takes a stall in: whole while there is room, and always in the totals."""
        with self._lock:
            self._count += 1
            self._seconds += stall.wait
            self._errors += bool(stall.error)
            self._buckets[bisect_left(BUCKETS_S, stall.wait)] += 1
            if len(self._kept) < self._limit:
                self._kept.append(stall._replace(error=stall.error[:ERROR_LENGTH_MAX]))

    def totals(self) -> dict[str, Any]:
        """Counts and seconds of all stalls; `buckets` has one more than BUCKETS_S, for the rest."""
        with self._lock:
            return {
                "count": self._count,
                "seconds": self._seconds,
                "errors": self._errors,
                "dropped": self._count - len(self._kept),
                "buckets": list(self._buckets),
            }

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON: a chunk is [number in `extents`, row]."""
        with self._lock:
            kept = list(self._kept)
        numbers: dict[str, int] = {}
        stalls = [
            stall._asdict()
            | {
                "chunks": [
                    (numbers.setdefault(extent, len(numbers)), row) for extent, row in stall.chunks
                ]
            }
            for stall in kept
        ]
        return {
            "opened": self.opened_wall,
            "totals": self.totals(),
            "extents": list(numbers),
            "stalls": stalls,
        }
