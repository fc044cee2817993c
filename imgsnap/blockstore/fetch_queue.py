"""The fetch queue: which chunks are wanted, by whom, and which are fetched next, together.

No I/O and no lock of its own: the fetcher calls it under its lock.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from imgsnap.blockstore.extent_cache import ExtentCache
from imgsnap.blockstore.statistics import Statistics
from imgsnap.digest import Digest
from imgsnap.formats.chunk_map import ChunkMap, ChunkPlace, Extent
from imgsnap.oci.repository import Descriptor, Repository
from imgsnap.units import KIB, MIB

RANGE_SIZE_MAX = MIB
"""A demand range asks for at most this much (or for one frame, if that is larger): large enough to
hide a round trip at 100 MB/s and 10 ms. That of background ranges follows the link (link.py)."""
RANGE_GAP_MAX = 32 * KIB
"""Unwanted bytes worth transferring to save a request: 0.3 ms at 100 MB/s."""
COALESCE_ROWS_MAX = 256
"""How far ahead in the extent neighbours are looked for."""


class Priority(IntEnum):
    """Someone waits; someone will probably ask soon; nobody waits."""

    DEMAND = 0
    READAHEAD = 1
    PREFETCH = 2


@dataclass(frozen=True, slots=True)
class ChunkSource:
    """One extent of a snapshot: where its chunks come from and where they are kept."""

    cache: ExtentCache
    extent: Extent
    chunk_map: ChunkMap
    packs: Mapping[Digest, Descriptor]
    repository: Repository
    statistics: Statistics  # of the snapshot that asks

    def place(self, row: int) -> ChunkPlace | None:
        return self.chunk_map.place(self.extent, row)

    def describe(self, row: int) -> str:
        """Names a chunk in messages: its id, pack and offset."""
        chunk, place = self.extent.chunk_id(row).hex(), self.place(row)
        if place is None:
            return f"chunk {chunk} (zeros)"
        return f"chunk {chunk} (pack {place.pack.digest}, offset {place.offset}+{place.length})"


ChunkKey = tuple[str, int]
"""Extent id and row: equal keys are equal bytes, whatever snapshot asks."""


class Batch:
    """Chunks that one caller waits for; `done` is called once, when all are there or one failed."""

    __slots__ = (
        *("_done", "deadline", "error", "finished", "held", "hosts", "priority"),
        "remaining",
    )

    def __init__(
        self, done: Callable[["Batch"], None], priority: Priority, deadline_s: float
    ) -> None:
        self.priority = priority
        self.remaining = 0
        self.held: dict[ChunkKey, bytes] = {}  # chunks that no disk could keep
        self.hosts: set[str] = set()  # who sent them; none for what was on this machine
        self.error: BaseException | None = None
        self.deadline = time.monotonic() + deadline_s
        self.finished = False
        self._done = done

    def settle(
        self, key: ChunkKey, kept: bytes | None, error: BaseException | None, host: str = ""
    ) -> bool:
        """Takes one chunk's outcome; True when the batch has just finished."""
        self.remaining -= 1
        if host:
            self.hosts.add(host)
        if kept is not None:
            self.held[key] = kept
        self.error = self.error or error
        if self.finished or (self.remaining and not self.error):
            return False
        self.finished = True
        return True

    def fail(self, error: BaseException) -> bool:
        """Ends the batch early; False when it has ended already."""
        if self.finished:
            return False
        self.finished, self.error = True, error
        return True

    def notify(self) -> None:
        self._done(self)


class Task:
    """One chunk that is wanted. In the queue until `running`."""

    __slots__ = ("done", "host", "key", "priority", "row", "running", "source", "waiters")

    def __init__(self, source: ChunkSource, row: int, priority: Priority) -> None:
        self.source = source
        self.row = row
        self.key: ChunkKey = (source.cache.id, row)
        self.priority = priority
        self.host = ""  # who sent the bytes that settle it
        self.running = False
        self.done = False
        self.waiters: list[Batch] = []

    @property
    def abandoned(self) -> bool:
        """Whether readers waited for it and all have given up."""
        return bool(self.waiters) and all(batch.finished for batch in self.waiters)


class FetchRange(NamedTuple):
    """Frames fetched by one request: bytes [start, end) of a pack; no pack for zero chunks."""

    tasks: Sequence[Task]
    pack: Descriptor | None
    start: int
    end: int
    priority: Priority


class FetchQueue:
    """Wanted chunks by key, and the order in which they are taken."""

    def __init__(self) -> None:
        self.tasks: dict[ChunkKey, Task] = {}
        self.waiting = [0 for _ in Priority]  # tasks that no thread has taken
        self._levels: dict[Priority, deque[Task]] = {level: deque() for level in Priority}

    def want(self, source: ChunkSource, row: int, priority: Priority, batch: Batch | None) -> None:
        """Adds a chunk, or joins the task that is there and promotes it."""
        task = self.tasks.get((source.cache.id, row))
        if task is None:
            task = self.tasks[source.cache.id, row] = Task(source, row, priority)
            self._levels[priority].append(task)
            self.waiting[priority] += 1
        elif not task.running and priority < task.priority:
            self.waiting[task.priority] -= 1
            self.waiting[priority] += 1
            task.priority = priority
            self._levels[priority].append(task)  # its old entry is skipped when it comes up
        if batch is not None:
            batch.remaining += 1
            task.waiters.append(batch)

    def take(self, room: Mapping[Priority, int]) -> FetchRange | None:
        """The next range to fetch, demand first. `room` is how many bytes a range of each kind may
        have, unless a single frame has more; 0 for none of that kind."""
        for level, queue in self._levels.items():
            size_max = room[level]
            while queue and size_max:
                task = queue.popleft()
                if task.running or task.priority is not level or not self._queued(task):
                    continue
                if task.abandoned:
                    self.finish(task)
                    self.waiting[level] -= 1
                    continue
                taken = self._coalesce(task, size_max)
                for one in taken.tasks:
                    self.waiting[one.priority] -= 1
                return taken
        return None

    def _queued(self, task: Task) -> bool:
        return self.tasks.get(task.key) is task

    def put_back(self, tasks: Sequence[Task]) -> None:
        """Queues tasks again that were taken but not fetched."""
        for task in tasks:
            if not task.done:
                task.running = False
                self._levels[task.priority].append(task)
                self.waiting[task.priority] += 1

    def clear(self) -> None:
        """Forgets everything that is queued."""
        self.tasks.clear()
        self.waiting = [0 for _ in Priority]
        for level in self._levels.values():
            level.clear()

    def finish(self, task: Task) -> list[Batch]:
        """Removes a task that has an outcome; who waited for it."""
        task.done = True
        if self._queued(task):
            del self.tasks[task.key]
        return task.waiters

    def _coalesce(self, first: Task, size_max: int) -> FetchRange:
        """The task and the queued ones that follow it closely in the same pack."""
        first.running = True
        place = first.source.place(first.row)
        if place is None:
            return FetchRange([first], None, 0, 0, first.priority)
        tasks, end = [first], place.offset + place.length
        for task, other in self._neighbours(first, place):
            if not 0 <= other.offset - end <= RANGE_GAP_MAX:
                continue
            if other.offset + other.length - place.offset > size_max:
                break
            task.running = True
            tasks.append(task)
            end = other.offset + other.length
        pack = first.source.packs[place.pack.digest]
        return FetchRange(tasks, pack, place.offset, end, first.priority)

    def _neighbours(self, first: Task, place: ChunkPlace) -> Iterator[tuple[Task, ChunkPlace]]:
        """Queued tasks of the same pack behind `first`; none that is less urgent."""
        last = min(len(first.source.extent), first.row + COALESCE_ROWS_MAX)
        for row in range(first.row + 1, last):
            task = self.tasks.get((first.key[0], row))
            if task is None or task.running or task.priority > first.priority:
                continue
            other = first.source.place(row) if task.source is first.source else None
            if other is not None and other.pack.digest == place.pack.digest:
                yield task, other
