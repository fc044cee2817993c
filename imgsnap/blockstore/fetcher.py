"""The fetcher: a few threads that bring chunks from a repository into the extent caches.

A chunk is fetched once however many readers want it, but for hedges. Every frame is decompressed
to exactly the size its row states and hashed before anyone sees it, while the rest of its range is
still on its way. In flight are at most `threads` ranges of FLIGHT_BYTES_MAX bytes in all
(flights.py), each with one frame and its chunk (CHUNK_SIZE_LIMIT) in memory.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from imgsnap.blockstore.fetch_queue import (
    Batch,
    ChunkSource,
    FetchQueue,
    Priority,
    Task,
)
from imgsnap.blockstore.flights import Flight, Flights
from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.pack_files import PackFiles
from imgsnap.blockstore.read_options import DEADLINE_S
from imgsnap.blockstore.statistics import FetchCounts
from imgsnap.digest import Digest, chunk_id
from imgsnap.errors import DigestMismatch, ImgsnapError, IntegrityError, Unavailable
from imgsnap.formats.chunk_map import ChunkPlace
from imgsnap.formats.frame import decompress_exact
from imgsnap.oci.repository import Descriptor, RangeBytes, RangeStream, RangeUnsupported

DEFAULT_THREADS = 32
"""Ranges in flight at most, each on its own connection; a thread is started when there is work."""
RESERVED_THREADS = 2
"""Threads that only demand reads use, so that they never wait for a slow background range."""
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
        self._flights = Flights()
        self._batches: set[Batch] = set()
        self._downloads: dict[Digest, list[Task]] = {}
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._watched = float("inf")  # when a waiting thread will look for late flights
        self._closed = False

    # Callers' side ---------------------------------------------------------------------------

    def fetch(
        self,
        wanted: Iterable[tuple[ChunkSource, int]],
        done: Callable[[Batch], None],
        *,
        priority: Priority = Priority.DEMAND,
        deadline_s: float = DEADLINE_S,
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
        if priority is Priority.DEMAND:  # it may have joined a flight that nobody waited for
            self._watch(self._flights.next_late())

    def _wake(self) -> None:
        """Lets one thread look at the queue; it wakes the next one when it leaves work there."""
        if not self._work_waits():
            return
        if self._idle:
            self._changed.notify()
        else:
            self._add_thread()

    def _work_waits(self) -> bool:
        waiting = self._queue.waiting
        return any(waiting) and any(waiting[kind] and room for kind, room in self._room().items())

    def _room(self) -> dict[Priority, int]:
        """How large the next range of each kind may be; 0 where none may begin."""
        flights = self._flights
        demand = flights.demand_room if flights.count < self._threads_max else 0
        if not demand or flights.background >= self._background_max:
            return {Priority.DEMAND: demand, Priority.READAHEAD: 0, Priority.PREFETCH: 0}
        return {
            Priority.DEMAND: demand,
            Priority.READAHEAD: flights.background_room,
            Priority.PREFETCH: flights.prefetch_room,
        }

    def _add_thread(self, more: int = 0) -> None:
        if len(self._threads) < self._threads_max + more:
            thread = threading.Thread(target=self._run, name="fetch", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if not self._threads:
                    raise
                _log.warning("no further thread to fetch with: %s", error)
                return
            self._threads.append(thread)

    def _watch(self, due: float | None) -> None:
        """Has a thread awake at `due` to hedge what is late by then: one that is idle, or one more
        than have ranges, since those that hang may be all of them."""
        if due is None or due >= self._watched:
            return
        if self._idle:
            self._changed.notify()
        else:
            self._add_thread(more=1)

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

    def window(self) -> int:
        """How many bytes in flight keep the link busy, as far as it is known."""
        with self._changed:
            return self._flights.link.window

    def close(self) -> None:
        """Fails what is queued and lets the threads end; one stuck in a transfer is left behind."""
        error = Unavailable("the block store is closing")
        with self._changed:
            self._closed = True
            self._queue.clear()
            failed = [batch for batch in self._batches if batch.fail(error)]
            self._batches.clear()
            self._flights.cancel_all()
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
        while (flight := self._next()) is not None:
            try:
                self._fly(flight)
            except Exception as error:  # a bug must not end the thread and hang its readers
                _log.exception("fetching failed unexpectedly")
                self._fail(flight, error)
            finally:
                with self._changed:
                    self._flights.end(flight)
                    self._wake()

    def _next(self) -> Flight | None:
        with self._changed:
            while not self._closed:
                taken = self._queue.take(self._room())
                flight = self._flights.begin(taken) if taken else self._flights.take_late()
                due = self._flights.next_late()
                if flight is not None:
                    self._wake()
                    self._watch(due)
                    return flight
                self._idle += 1
                self._watched = float("inf") if due is None else due
                self._changed.wait(None if due is None else max(0.0, due - time.monotonic()))
                self._watched = float("inf")
                self._idle -= 1
        return None

    def _fly(self, flight: Flight) -> None:
        tasks, pack = flight.range.tasks, flight.range.pack
        if pack is None:
            for task in tasks:
                self._finish_zeros(task)
            return
        if flight.second:
            tasks[0].source.statistics.hedges += 1
        try:
            try:
                self._stream(flight, pack)
            except RangeUnsupported:
                with self._changed:
                    self._flights.answer(flight)
                if self._download(tasks, pack, flight.range.priority):
                    self._stream(flight, pack)
        except (ImgsnapError, OSError) as error:
            self._fail(flight, error)

    def _stream(self, flight: Flight, pack: Descriptor) -> None:
        """Settles each chunk as soon as its frame is in; damaged ones are asked for once more."""
        taken, position = flight.range, flight.range.start
        damaged = []
        source = taken.tasks[0].source
        with self._open(flight, source, pack, taken.start, taken.end) as stream:
            with self._changed:
                self._flights.answer(flight)
            for task in taken.tasks:
                place = _place(task)
                self._read(flight, stream, place.offset - position)
                frame = self._read(flight, stream, place.length)
                position = place.offset + place.length
                if len(frame) != place.length:
                    raise Unavailable(
                        f"pack {pack.digest}: {len(frame)} bytes of {place.length} "
                        f"at {place.offset}"
                    )
                if task.done:
                    continue
                try:
                    data = _decode(task, frame)
                except IntegrityError as error:
                    self._count_damage(task, error)
                    stream.reject()
                    damaged.append(task)
                    continue
                if not self._wins(flight):
                    return
                task.host = stream.host
                self._settle(task, data, None)
        for task in damaged:
            if not self._wins(flight):
                return
            self._retry(flight, task, pack)

    def _read(self, flight: Flight, stream: RangeStream, size: int) -> bytes:
        """The next bytes of a range, counted."""
        if not size:
            return b""
        data = stream.read(size)
        source = flight.range.tasks[0].source
        if stream.host:
            _counts(source, flight.range.priority).bytes += len(data)
            source.statistics.host(stream.host).bytes += len(data)
        with self._changed:
            limited = any(self._queue.waiting[1:]) and not self._room()[Priority.READAHEAD]
            self._flights.arrive(flight, len(data), limited=limited)
            self._wake()
        return data

    @contextmanager
    def _open(
        self, flight: Flight, source: ChunkSource, pack: Descriptor, start: int, end: int
    ) -> Iterator[RangeStream]:
        """A range from the pack on disk, if it is there whole, else from its repository."""
        data = self._packs.read(pack, start, end - start)
        if data is not None:
            yield RangeBytes("", data)
            return
        with source.repository.open_range(
            pack,
            start,
            end - start,
            cancellation=flight.cancellation,
            second=flight.second,
        ) as stream:
            _counts(source, flight.range.priority).requests += 1
            source.statistics.host(stream.host).requests += 1
            yield stream

    def _wins(self, flight: Flight) -> bool:
        """Whether a flight's chunks count; its rival, if it has one, is given up then."""
        with self._changed:
            if flight.lost:
                return False
            rival, flight.rival = flight.rival, None
            if rival is not None:
                rival.lost, rival.rival = True, None
        if rival is not None:
            rival.cancellation.cancel()
        return True

    def _fail(self, flight: Flight, error: BaseException) -> None:
        """Fails the chunks that a flight still owed, unless they are its rival's to bring."""
        with self._changed:
            if flight.rival is not None:
                flight.rival.rival = None
                flight.lost = True
        if not flight.lost:
            for task in flight.range.tasks:
                self._settle(task, None, error)

    def _download(self, tasks: Sequence[Task], pack: Descriptor, priority: Priority) -> bool:
        """Fetches the whole pack, or parks `tasks` when another thread does so already."""
        source = tasks[0].source
        with self._changed:
            if self._packs.has(pack):
                return True  # it came while our range request was refused
            parked = self._downloads.get(pack.digest)
            if parked is not None:
                parked.extend(task for task in tasks if task not in parked)
                return False
            self._downloads[pack.digest] = []
        failure: Exception | None = None
        try:
            _log.info("%s ignores ranges: fetching pack %s", source.repository.name, pack.digest)
            self._packs.download(source.repository, pack)
            _count(source, priority, pack.size)
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

    def _retry(self, flight: Flight, task: Task, pack: Descriptor) -> None:
        """Asks for a damaged frame once more, alone."""
        place = _place(task)
        self._packs.discard(pack)
        span = (task.source, pack, place.offset, place.offset + place.length)
        try:
            try:
                with self._open(flight, *span) as stream:
                    frame = self._read(flight, stream, place.length)
                    task.host = stream.host
            except RangeUnsupported:
                if not self._download([task], pack, flight.range.priority):
                    return
                with self._open(flight, *span) as stream:
                    frame = self._read(flight, stream, place.length)
            data = _decode(task, frame)
        except IntegrityError as error:
            task.source.statistics.source_damage += 1
            what = task.source.describe(task.row)
            self._settle(task, None, IntegrityError(f"{what} is damaged in the store: {error}"))
        except (ImgsnapError, OSError) as error:
            self._settle(task, None, error)
        else:
            self._settle(task, data, None)

    def _count_damage(self, task: Task, error: IntegrityError) -> None:
        task.source.statistics.source_damage += 1
        what = task.source.describe(task.row)
        self._damage.log(logging.WARNING, "%s is damaged, asking again: %s", what, error)

    def _settle(self, task: Task, data: bytes | None, error: BaseException | None) -> None:
        """Stores a verified chunk and tells everyone who waits for it; the first outcome counts."""
        if task.done:
            return
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
            finished = [b for b in waiters if b.settle(task.key, kept, error, task.host)]
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


def _place(task: Task) -> ChunkPlace:
    place = task.source.place(task.row)
    if place is None:
        raise AssertionError("a zero chunk in a range")
    return place


def _decode(task: Task, frame: bytes) -> bytes:
    """A chunk's verified bytes. Raises IntegrityError."""
    expected = task.source.extent.chunk_id(task.row)
    size = task.source.cache.place(task.row)[1]
    data = decompress_exact(frame, size, record="chunk frame")
    got = chunk_id(data)
    if got != expected:
        raise DigestMismatch("chunk", expected.hex(), got.hex())
    return data
