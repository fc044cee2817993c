"""The blocks of a boot pack as they arrive: verified, in a file of their own.

Blocks come in the pack's order, so that one number says which are here. They are kept apart from
the extent cache, whose unit is the chunk: nothing that happens to the cache can touch them.
"""

import heapq
import os
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.statistics import PackCounts
from imgsnap.errors import ImgsnapError
from imgsnap.units import BLOCK_BITS, BLOCK_SIZE

if TYPE_CHECKING:  # 4 ms, which the thread that loads packs spends while it waits
    from imgsnap.formats.boot_pack import BootTable

PATIENCE_S = 3.0
"""A reader waits this long for a pack that makes no progress; then it reads without it."""
WAIT_MAX_S = 2.0
"""Blocks that will take longer to come, at the rate of those before them, are fetched alone: who
reads far ahead of the recorded order should not wait for all of it."""


class _Index:
    """Where the blocks of one extent are: runs by first block, each with its first slot."""

    __slots__ = ("counts", "firsts", "slots")

    def __init__(self, runs: list[tuple[int, int, int]]) -> None:
        runs.sort()
        self.firsts = array("I", (first for first, _, _ in runs))
        self.counts = array("I", (count for _, count, _ in runs))
        self.slots = array("I", (slot for _, _, slot in runs))

    def find(self, block: int, count: int) -> list[tuple[int, int]] | None:
        """(slot, count) pieces of a run of blocks; None when the pack lacks one of them."""
        found: list[tuple[int, int]] = []
        at = bisect_right(self.firsts, block) - 1
        while count:
            if not 0 <= at < len(self.firsts):
                return None
            into = block - self.firsts[at]
            left = self.counts[at] - into
            if into < 0 or left <= 0:
                return None
            taken = min(left, count)
            found.append((self.slots[at] + into, taken))
            block, count, at = block + taken, count - taken, at + 1
        return found


class BootBuffer:
    """Safe for threads. Slots number the pack's blocks in the order of their arrival."""

    def __init__(self, cache: NodeCache) -> None:
        self.counts = PackCounts()
        self._cache = cache
        self._lock = threading.Lock()
        self._file = -1
        self._index: dict[str, _Index] = {}
        self._used = bytearray()
        self._waiters: list[tuple[int, int, Callable[[], None]]] = []  # a heap by slot
        self._serial = 0
        self._arrived = 0
        self._expected = 0
        self._ended = False
        self._hopeful = True
        self._progress = self._opened = time.monotonic()

    # The readers' side -----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether it may soon be known what the pack holds."""
        return not (self._index or self._ended) and self._hopeful

    def until(self, extent: str, offset: int, length: int) -> int | None:
        """How many blocks must have arrived before these bytes of an extent can be read; None when
        they will not come from here."""
        pieces = self._find(extent, offset, length)
        if pieces is None:
            return None
        last = max(slot + count for slot, count in pieces)
        if last <= self._arrived:
            return last
        may_come = self._hopeful and not self._ended
        return last if may_come and self._seconds_until(last) <= WAIT_MAX_S else None

    def read_into(self, extent: str, offset: int, view: memoryview) -> bool:
        """Fills `view` with these bytes of an extent if all have arrived."""
        pieces = self._find(extent, offset, len(view))
        if pieces is None or any(slot + count > self._arrived for slot, count in pieces):
            return False
        into, done = offset & BLOCK_SIZE - 1, 0
        for slot, count in pieces:
            size = min((count << BLOCK_BITS) - into, len(view) - done)
            target = view[done : done + size]
            try:
                if os.preadv(self._file, (target,), (slot << BLOCK_BITS) + into) != size:
                    return False
            except OSError:
                return False
            into, done = 0, done + size
            self._use(slot, count)
        return True

    def wait(self, until: int, then: Callable[[], None]) -> None:
        """Calls `then` once: when so many blocks have arrived, or when nobody should wait."""
        with self._lock:
            waiting = not self._ended and self._hopeful and (until > self._arrived or self.pending)
            if waiting:
                if not self._waiters:
                    self._progress = max(self._progress, time.monotonic())
                self._serial += 1
                self.counts.waits += 1
                heapq.heappush(self._waiters, (until, self._serial, then))
        if not waiting:
            then()

    def _seconds_until(self, blocks: int) -> float:
        """When so many will have arrived, by the rate so far; 0 while there is none."""
        elapsed = time.monotonic() - self._opened
        return (blocks - self._arrived) * elapsed / self._arrived if self._arrived else 0.0

    def _find(self, extent: str, offset: int, length: int) -> list[tuple[int, int]] | None:
        index = self._index.get(extent)
        if index is None:
            return None
        first = offset >> BLOCK_BITS
        return index.find(first, ((offset + length - 1) >> BLOCK_BITS) - first + 1)

    def _use(self, slot: int, count: int) -> None:
        fresh = count - self._used.count(1, slot, slot + count)
        self.counts.served += count
        if fresh:
            self.counts.used += fresh
            self._used[slot : slot + count] = b"\1" * count

    # The stream's side -----------------------------------------------------------------------

    def open(self, table: "BootTable") -> None:
        """Takes what the pack will hold. Raises ImgsnapError when there is no room for it."""
        runs: dict[str, list[tuple[int, int, int]]] = {}
        slot = 0
        for frame in table.frames:
            for run in frame.runs:
                extent = table.extents[run.extent].id
                runs.setdefault(extent, []).append((run.first, run.blocks, slot))
                slot += run.blocks
        file = self._cache.anonymous_file()
        with self._lock:
            self._file, self._expected, self._used = file, slot, bytearray(slot)
            self._index = {extent: _Index(own) for extent, own in runs.items()}
            self._opened = time.monotonic()
            released = self._advance(0)
        _call(released)

    def add(self, content: bytes) -> None:
        """Takes the next blocks, verified. Raises OSError when they cannot be kept."""
        view, offset = memoryview(content), self._arrived << BLOCK_BITS
        with self._lock:
            if self._file < 0:
                raise ImgsnapError("the snapshot was closed")
            while view:
                count = os.pwrite(self._file, view, offset)
                view, offset = view[count:], offset + count
            released = self._advance(len(content) >> BLOCK_BITS)
        self.counts.blocks += len(content) >> BLOCK_BITS
        _call(released)

    def _advance(self, blocks: int) -> Iterator[Callable[[], None]]:
        """Under the lock: who need not wait any longer."""
        self._arrived += blocks
        self._hopeful = True
        self._progress = time.monotonic()
        released = []
        while self._waiters and self._waiters[0][0] <= self._arrived:
            released.append(heapq.heappop(self._waiters)[2])
        return iter(released)

    def end(self) -> None:
        """No more blocks will come; those that came stay."""
        with self._lock:
            self._ended = True
            released = self._release()
        _call(released)

    def check_progress(self) -> None:
        """Lets readers go who have waited for PATIENCE_S without anything arriving."""
        with self._lock:
            if not self._waiters or time.monotonic() - self._progress < PATIENCE_S:
                return
            self._hopeful = False
            self.counts.given_up += 1
            released = self._release()
        _call(released)

    def _release(self) -> Iterator[Callable[[], None]]:
        released = [then for _, _, then in self._waiters]
        self._waiters.clear()
        return iter(released)

    def close(self) -> None:
        """No reader may come later."""
        self.end()
        with self._lock:
            file, self._file = self._file, -1
            self._index = {}
        if file >= 0:
            os.close(file)


def _call(released: Iterator[Callable[[], None]]) -> None:
    for then in released:
        then()
