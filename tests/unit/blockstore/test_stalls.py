"""The stall log: what waited is noted with its chunks and its source, within fixed bounds."""

import threading

import pytest

from imgsnap.blockstore.stalls import BUCKETS_S, CHUNKS_MAX, ERROR_LENGTH_MAX, StallLog
from imgsnap.errors import Unavailable
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def ignore(data, error) -> None:
    pass


def log_with_clock(**options) -> tuple[StallLog, Clock]:
    clock = Clock()
    return StallLog(clock, lambda: 5000.0, **options), clock


def test_a_stall_has_times_chunks_and_sources():
    log, clock = log_with_clock()
    got = []
    clock.now += 2
    waiting = log.begin(4096, 8192, lambda data, error: got.append((data, error)))
    waiting.wants([("aa", 3), ("bb", 0)])
    waiting.wants([("aa", 3)])  # lost and fetched again: one chunk all the same
    clock.now += 0.25
    waiting.served({"two", "one"})
    view = memoryview(b"x")
    waiting(view, None)
    assert got == [(view, None)]
    value = log.as_dict()
    assert value["opened"] == 5000.0 and value["extents"] == ["aa", "bb"]
    (stall,) = value["stalls"]
    assert stall == {
        "at": 2.0, "wait": 0.25, "offset": 4096, "length": 8192, "chunks": [(0, 3), (1, 0)],
        "chunk_count": 2, "sources": ("one", "two"), "error": "",
    }  # fmt: skip
    assert value["totals"]["count"] == 1 and value["totals"]["seconds"] == 0.25


def test_the_end_of_a_wait_without_a_host_or_with_an_error():
    log, _ = log_with_clock()
    log.begin(0, 1, ignore)(memoryview(b""), None)
    log.begin(0, 1, ignore)(None, Unavailable("no answer " * 100))
    log.begin(0, 1, ignore)(None, TimeoutError())
    here, failed, bare = log.as_dict()["stalls"]
    assert here["sources"] == ("cache",) and not here["error"]
    assert failed["sources"] == () and failed["error"].startswith("no answer")
    assert len(failed["error"]) == ERROR_LENGTH_MAX
    assert bare["error"] == "TimeoutError"
    assert log.totals()["errors"] == 2


def test_only_the_first_ones_are_kept_and_all_are_counted():
    log, clock = log_with_clock(limit=3)
    for number in range(10):
        waiting = log.begin(number, 1, ignore)
        waiting.wants((f"{row:x}", row) for row in range(CHUNKS_MAX + 5))
        clock.now += 1
        waiting(None, None)
    value = log.as_dict()
    assert [stall["offset"] for stall in value["stalls"]] == [0, 1, 2]
    assert all(len(stall["chunks"]) == CHUNKS_MAX for stall in value["stalls"])
    assert all(stall["chunk_count"] == CHUNKS_MAX + 5 for stall in value["stalls"])
    assert value["totals"]["count"] == 10 and value["totals"]["dropped"] == 7
    assert value["totals"]["seconds"] == pytest.approx(10)


@pytest.mark.parametrize("bucket", range(len(BUCKETS_S) + 1))
def test_a_wait_is_counted_in_the_first_bucket_that_holds_it(bucket: int):
    end = BUCKETS_S[bucket] if bucket < len(BUCKETS_S) else 1000.0
    start = BUCKETS_S[bucket - 1] if bucket else 0.0
    for wait in (end, (start + end) / 2):
        log = StallLog()
        waiting = log.begin(0, 1, ignore)
        log.add(_stall(log, waiting, wait))
        buckets = log.totals()["buckets"]
        assert [n for n, count in enumerate(buckets) if count] == [bucket]


def _stall(log: StallLog, waiting, wait: float):
    waiting(None, None)
    stall = log._kept.pop()._replace(wait=wait)
    log._buckets = [0] * len(log._buckets)
    return stall


def test_threads_lose_no_stall():
    log = StallLog()

    def many() -> None:
        for _ in range(500):
            log.begin(0, 1, ignore)(None, None)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = log.totals()
    assert totals["count"] == sum(totals["buckets"]) == 2000


def test_the_reader_notes_misses_with_their_chunks_and_host(tmp_path):
    built = build_snapshot(random_device(300))
    repository = MemoryRepository()
    repository.add(built)
    with open_store(repository, tmp_path) as store:
        offset = 100 * 4096
        assert store.reader.read(offset, 5000) == built.device[offset : offset + 5000]
        assert store.reader.read(offset, 5000) == built.device[offset : offset + 5000]
        value = store.reader.stalls.as_dict()
    assert (store.statistics.misses, store.statistics.hits) == (1, 1)
    (stall,) = value["stalls"]
    assert (stall["offset"], stall["length"]) == (offset, 5000) and stall["wait"] > 0
    assert set(stall["sources"]) == set(store.statistics.hosts) != set()
    extents = {extent.id: extent for extent in built.chunk_map.extents}
    bases = {extent.extent_id: extent.base_block for extent in built.config.extents}
    wanted = set()
    for number, row in stall["chunks"]:
        name = value["extents"][number]
        first = bases[name] + sum(extents[name].blocks[:row])
        wanted |= set(range(first, first + extents[name].blocks[row]))
    assert {100, 101} <= wanted
