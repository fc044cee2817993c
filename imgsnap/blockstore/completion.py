"""Background completion: the rest of a snapshot, fetched while it is being read.

At PREFETCH priority and a few batches at a time, so that readers go first, in the order of the
extents, which is that of the packs. It begins with the first read that had to wait, or, unless it
is asked for, when the reads show that most of the snapshot will be wanted.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from imgsnap.blockstore.fetch_queue import Batch, ChunkSource, Priority
from imgsnap.blockstore.fetcher import Fetcher
from imgsnap.blockstore.read_options import Prefetch
from imgsnap.blockstore.statistics import Statistics

MOST_READ = 0.35
"""Share of the chunks that reads have brought in. Few starts bring so much: one that does is a scan
or as good as one, and the link is better kept busy in the gaps between its reads."""
BATCH_ROWS = 64
"""Chunks asked for at a time: 16 MiB of the device, 5 MiB of packs."""
BATCHES = 4
AGAIN_S = 30.0
"""After a batch that failed: the registry may come back."""
DEADLINE_S = 600.0

_log = logging.getLogger(__name__)


class Completion:
    """One snapshot's. Safe for threads; `rate` in bytes of packs per second, 0 for no limit."""

    def __init__(
        self,
        sources: Sequence[ChunkSource],
        fetcher: Fetcher,
        statistics: Statistics,
        mode: Prefetch,
        rate: int = 0,
    ) -> None:
        self._sources = sources
        self._fetcher = fetcher
        self._statistics = statistics
        self._chunks = sum(len(source.extent) for source in sources)
        self._mode = mode
        self._rate = rate
        self._lock = threading.Lock()
        self._batches = self._all_batches()
        self._begun = False
        self._stopped = False
        self._timers: set[threading.Timer] = set()
        self._due = 0.0

    @property
    def adaptive(self) -> bool:
        """Whether anything may be fetched that no read asked for or is near."""
        return self._mode is not Prefetch.OFF

    @property
    def brought(self) -> float:
        """The share of the chunks that reads have brought in, with what was read ahead."""
        brought = self._statistics.demand.chunks + self._statistics.readahead.chunks
        return brought / max(self._chunks, 1)

    def waited(self) -> None:
        """A read had to wait for the network: begins, if it is time."""
        if self._begun or not self.adaptive:
            return
        if self._mode is Prefetch.PACK and self.brought < MOST_READ:
            return
        with self._lock:
            if self._begun:
                return
            self._begun = True
        _log.info("fetching the rest of the snapshot in the background")
        for _ in range(1 if self._rate else BATCHES):
            self._next()

    def stop(self) -> None:
        """Asks for nothing more."""
        with self._lock:
            self._stopped = True
            timers, self._timers = self._timers, set()
        for timer in timers:
            timer.cancel()

    def _all_batches(self) -> Iterator[tuple[ChunkSource, range]]:
        for source in self._sources:
            count = len(source.extent)
            for first in range(0, count, BATCH_ROWS):
                yield source, range(first, min(count, first + BATCH_ROWS))

    def _next(self) -> None:
        with self._lock:
            while not self._stopped:
                source, rows = next(self._batches, (None, range(0)))
                if source is None:
                    return
                if source.cache.storing and (absent := source.cache.absent(rows)):
                    break
            else:
                return
        self._fetch(source, absent)

    def _fetch(self, source: ChunkSource, rows: list[int]) -> None:
        def done(batch: Batch) -> None:
            if batch.error is None:
                self._later(self._delay_s(source, rows), self._next)
            else:
                self._later(AGAIN_S, lambda: self._fetch(source, rows))

        wanted = [(source, row) for row in rows]
        self._fetcher.fetch(wanted, done, priority=Priority.PREFETCH, deadline_s=DEADLINE_S)

    def _delay_s(self, source: ChunkSource, rows: list[int]) -> float:
        """How long until these bytes are within the rate."""
        if not self._rate:
            return 0.0
        places = [source.place(row) for row in rows]
        size = sum(place.length for place in places if place is not None)
        now = time.monotonic()
        self._due = max(self._due, now) + size / self._rate
        return self._due - now

    def _later(self, seconds: float, step: Callable[[], None]) -> None:
        if seconds <= 0:
            step()
            return

        def run() -> None:
            with self._lock:
                self._timers.discard(timer)
                stopped = self._stopped
            if not stopped:
                step()

        timer = threading.Timer(seconds, run)
        timer.daemon = True
        with self._lock:
            if self._stopped:
                return
            self._timers.add(timer)
        timer.start()
