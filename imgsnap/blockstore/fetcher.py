"""The fetcher: a few threads that bring chunks from a repository into the extent caches.

A chunk is fetched once however many readers want it. Every frame is decompressed to exactly the
size its row states and hashed before anyone sees it. In flight are at most `threads` ranges of
RANGE_SIZE_MAX bytes, each with one decompressed chunk (CHUNK_SIZE_LIMIT) at a time.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from imgsnap.blockstore.fetch_queue import (
    Batch,
    ChunkSource,
    FetchQueue,
    FetchRange,
    Priority,
    Task,
)
from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.pack_files import PackFiles
from imgsnap.blockstore.statistics import FetchCounts
from imgsnap.digest import Digest, chunk_id
from imgsnap.errors import DigestMismatch, ImgsnapError, IntegrityError, Unavailable
from imgsnap.formats.frame import decompress_exact
from imgsnap.oci.repository import Descriptor, RangeUnsupported

DEFAULT_THREADS = 8
RESERVED_THREADS = 2
"""Threads that only demand reads use, so that they never wait for a slow background range."""
DEFAULT_DEADLINE_S = 60.0
_JOIN_S = 2.0

_log = logging.getLogger(__name__)


class Fetcher:
    """Threads are started when there is work for them, and are daemons."""

    def __init__(self, cache: NodeCache, threads: int = DEFAULT_THREADS) -> None:
        self._threads_max = threads
        self._background_max = max(1, threads - RESERVED_THREADS)
        self._packs = PackFiles(cache)
        self._damage = RateLimit(_log)
        self._changed = threading.Condition()
        # All below under the condition's lock.
        self._queue = FetchQueue()
        self._batches: set[Batch] = set()
        self._downloads: dict[Digest, list[Task]] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._background = 0
        self._closed = False

    # Callers' side ---------------------------------------------------------------------------

    def fetch(
        self,
        wanted: Iterable[tuple[ChunkSource, int]],
        done: Callable[[Batch], None],
        *,
        priority: Priority = Priority.DEMAND,
        deadline_s: float = DEFAULT_DEADLINE_S,
    ) -> None:
        """Brings chunks in; `done` is called once, from a fetcher thread or from here.

        The batch's `error` is None when each chunk is verified in its cache or in `held`.
        """
        batch = Batch(done, priority, deadline_s)
        with self._changed:
            if self._closed:
                batch.fail(Unavailable("the block store is closing"))
            else:
                self._want(wanted, priority, batch)
                batch.finished = not batch.remaining
            # Decided under the lock: from here on a thread may finish the batch.
            finished = batch.finished
            if not finished:
                self._batches.add(batch)
        if finished:
            batch.notify()

    def hint(self, wanted: Iterable[tuple[ChunkSource, int]], priority: Priority) -> None:
        """As `fetch` when nobody waits; failures are counted and forgotten."""
        with self._changed:
            if not self._closed:
                self._want(wanted, priority, None)

    def _want(
        self,
        wanted: Iterable[tuple[ChunkSource, int]],
        priority: Priority,
        batch: Batch | None,
    ) -> None:
        for source, row in wanted:
            if not source.cache.verified(row):
                self._queue.want(source, row, priority, batch)
        self._wake()

    def _wake(self) -> None:
        """Lets one thread look at the queue; it wakes the next one when it leaves work there."""
        if not self._queue.waiting:
            return
        if self._idle:
            self._changed.notify()
        elif len(self._threads) < self._threads_max:
            thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            self._threads.append(thread)
            thread.start()

    def expire(self) -> int:
        """Fails the batches whose deadline has passed; how many. Call it every few seconds."""
        now = time.monotonic()
        late = Unavailable("the bytes did not arrive before the read's deadline")
        with self._changed:
            expired = [b for b in self._batches if b.deadline < now and b.fail(late)]
            self._batches.difference_update(expired)
        for batch in expired:
            batch.notify()
        return len(expired)

    def close(self) -> None:
        """Fails what is queued and lets the threads end; one stuck in a transfer is left behind."""
        error = Unavailable("the block store is closing")
        with self._changed:
            self._closed = True
            self._queue.clear()
            failed = [batch for batch in self._batches if batch.fail(error)]
            self._batches.clear()
            self._changed.notify_all()
        for batch in failed:
            batch.notify()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_JOIN_S)
        if not any(thread.is_alive() for thread in self._threads):
            self._packs.close()

    # Threads' side ---------------------------------------------------------------------------

    def _run(self) -> None:
        while (taken := self._next()) is not None:
            try:
                self._fetch_range(taken)
            except Exception as error:  # a bug must not end the thread and hang its readers
                _log.exception("fetching failed unexpectedly")
                for task in taken.tasks:
                    self._settle(task, None, error)
            finally:
                if taken.priority is not Priority.DEMAND:
                    with self._changed:
                        self._background -= 1
                        self._changed.notify()

    def _next(self) -> FetchRange | None:
        with self._changed:
            while not self._closed:
                taken = self._queue.take(background=self._background < self._background_max)
                if taken is not None:
                    self._background += taken.priority is not Priority.DEMAND
                    self._wake()
                    return taken
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
        return None

    def _fetch_range(self, taken: FetchRange) -> None:
        if taken.pack is None:
            for task in taken.tasks:
                self._finish_zeros(task)
            return
        try:
            data = self._read(taken.pack, taken.start, taken.end, taken)
        except (ImgsnapError, OSError) as error:
            for task in taken.tasks:
                self._settle(task, None, error)
            return
        if data is None:
            return  # parked until the whole pack is here
        view = memoryview(data)
        for task in taken.tasks:
            place = task.source.place(task.row)
            if place is None:
                raise AssertionError("a zero chunk in a range")
            start = place.offset - taken.start
            self._finish_frame(task, taken.pack, view[start : start + place.length])

    def _read(self, pack: Descriptor, start: int, end: int, taken: FetchRange) -> bytes | None:
        """Bytes of a pack. None when `taken` waits for another thread's download of it."""
        source, length = taken.tasks[0].source, end - start
        data = self._packs.read(pack, start, length)
        if data is None:
            try:
                data = source.repository.read_range(pack, start, length)
                _count(source, taken.priority, length)
            except RangeUnsupported:
                if not self._download(source, pack, taken):
                    return None
                data = self._packs.read(pack, start, length) or b""
        if len(data) != length:
            raise Unavailable(f"pack {pack.digest}: {len(data)} bytes of {length} at {start}")
        return data

    def _download(self, source: ChunkSource, pack: Descriptor, taken: FetchRange) -> bool:
        """Fetches the whole pack, or parks `taken` when another thread does so already."""
        with self._changed:
            if self._packs.has(pack):
                return True  # it came while our range request was refused
            parked = self._downloads.get(pack.digest)
            if parked is not None:
                parked.extend(taken.tasks)
                return False
            self._downloads[pack.digest] = []
        failure: Exception | None = None
        try:
            _log.info("%s ignores ranges: fetching pack %s", source.repository.name, pack.digest)
            self._packs.download(source.repository, pack)
            _count(source, taken.priority, pack.size)
        except Exception as error:
            failure = error
            raise
        finally:
            with self._changed:
                waiting = self._downloads.pop(pack.digest)
                if failure is None:
                    self._queue.put_back(waiting)
                    self._wake()
            if failure is not None:
                for task in waiting:
                    self._settle(task, None, failure)
        return True

    # One chunk -------------------------------------------------------------------------------

    def _finish_zeros(self, task: Task) -> None:
        size = task.source.cache.place(task.row)[1]
        data = bytes(size)
        if chunk_id(data) != task.source.extent.chunk_id(task.row):
            what = task.source.describe(task.row)
            self._settle(task, None, IntegrityError(f"{what} is not one of zeros"))
            return
        self._settle(task, data, None)

    def _finish_frame(self, task: Task, pack: Descriptor, frame: memoryview) -> None:
        """Decodes a frame; a damaged one is asked for once more, alone."""
        try:
            data = _decode(task, frame)
        except IntegrityError as error:
            task.source.statistics.source_damage += 1
            what = task.source.describe(task.row)
            self._damage.log(logging.WARNING, "%s is damaged, asking again: %s", what, error)
            self._retry(task, pack)
            return
        self._settle(task, data, None)

    def _retry(self, task: Task, pack: Descriptor) -> None:
        place = task.source.place(task.row)
        if place is None:
            raise AssertionError("a zero chunk has no frame")
        self._packs.discard(pack)
        alone = FetchRange([task], pack, place.offset, place.offset + place.length, task.priority)
        try:
            frame = self._read(pack, alone.start, alone.end, alone)
            if frame is None:
                return
            data = _decode(task, memoryview(frame))
        except IntegrityError as error:
            task.source.statistics.source_damage += 1
            what = task.source.describe(task.row)
            self._settle(task, None, IntegrityError(f"{what} is damaged in the store: {error}"))
        except (ImgsnapError, OSError) as error:
            self._settle(task, None, error)
        else:
            self._settle(task, data, None)

    def _settle(self, task: Task, data: bytes | None, error: BaseException | None) -> None:
        """Stores a verified chunk and tells everyone who waits for it."""
        kept: bytes | None = None
        if data is not None:
            _counts(task.source, task.priority).chunks += 1
            if not task.source.cache.store(task.row, data):
                task.source.statistics.unstored += 1
                kept = data
        else:
            task.source.statistics.failures += 1
            _log.debug("%s: %s", task.source.describe(task.row), error)
            if self._try_for_demand(task):
                return
        with self._changed:
            waiters = self._queue.finish(task)
            finished = [batch for batch in waiters if batch.settle(task.key, kept, error)]
            self._batches.difference_update(finished)
        notify_all(finished)

    def _try_for_demand(self, task: Task) -> bool:
        """Queues a failed background task again for a reader who joined it under way: the reader
        is owed an attempt of its own."""
        with self._changed:
            wanted = min((batch.priority for batch in task.waiters), default=task.priority)
            if wanted >= task.priority or self._closed:
                return False
            task.priority = wanted
            self._queue.put_back([task])
            self._wake()
            return True


def _count(source: ChunkSource, priority: Priority, size: int) -> None:
    counts = _counts(source, priority)
    counts.requests += 1
    counts.bytes += size


def _counts(source: ChunkSource, priority: Priority) -> FetchCounts:
    statistics = source.statistics
    return (statistics.demand, statistics.readahead, statistics.prefetch)[priority]


def notify_all(batches: Sequence[Batch]) -> None:
    """Calls everyone, also when one of them raises."""
    for batch in batches:
        try:
            batch.notify()
        except Exception:
            _log.exception("a completion failed")


def _decode(task: Task, frame: memoryview) -> bytes:
    """A chunk's verified bytes. Raises IntegrityError."""
    expected = task.source.extent.chunk_id(task.row)
    size = task.source.cache.place(task.row)[1]
    data = decompress_exact(frame, size, record="chunk frame")
    got = chunk_id(data)
    if got != expected:
        raise DigestMismatch("chunk", expected.hex(), got.hex())
    return data
