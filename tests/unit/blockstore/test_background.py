"""What background work may have in flight, so that a demand read finds the link almost free."""

import random
import threading

import pytest

from imgsnap.blockstore.fetch_queue import RANGE_SIZE_MAX, Priority
from imgsnap.blockstore.link import WINDOW_FIRST
from imgsnap.units import BLOCK_SIZE, MIB
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot
from tests.unit.blockstore.test_fetcher import frames

SIZE = 12 * MIB


@pytest.fixture(scope="module")
def built():
    device = random.Random(5).randbytes(SIZE)  # packs as large as the device
    return build_snapshot(device, extents=1, packs=1, chunk_blocks=(16,))


def until(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never came")


def test_a_full_prefetch_keeps_one_window_in_flight_and_demand_goes_out_at_once(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=32) as store:
        repository.gate = threading.Event()
        warming = threading.Thread(target=store.reader.warm)
        warming.start()
        until(lambda: sum(length for *_, length in repository.ranges) >= WINDOW_FIRST // 2)
        threading.Event().wait(0.1)  # more would be asked for now, if more were
        background = sum(length for *_, length in repository.ranges)
        assert background <= WINDOW_FIRST
        before = len(repository.ranges)
        offset, size, *_ = frames(built)[-1]
        arrived = threading.Event()
        store.reader.fetch(offset, size, lambda data, error: arrived.set())
        until(lambda: len(repository.ranges) > before)
        assert repository.ranges[before][2] < RANGE_SIZE_MAX
        assert repository.ranges[before][1] == frames(built)[-1][3]
        repository.gate.set()
        assert arrived.wait(20)
        warming.join(20)
        assert store.statistics.demand.requests == 1


def test_readahead_is_taken_before_prefetch(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=1) as store:
        repository.gate = threading.Event()
        source = store.reader._parts[1].source
        store.fetcher.hint([(source, 0)], Priority.PREFETCH)
        until(lambda: repository.ranges)
        store.fetcher.hint([(source, 80)], Priority.PREFETCH)
        store.fetcher.hint([(source, 160)], Priority.READAHEAD)
        store.reader.fetch(frames(built)[120][0], BLOCK_SIZE, lambda data, error: None)
        repository.gate.set()
        until(lambda: len(repository.ranges) == 4)
    places = [source.place(row).offset for row in (0, 120, 160, 80)]
    assert [offset for _, offset, _ in repository.ranges] == places


def test_the_ranges_of_one_read_go_out_together(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=32) as store:
        repository.gate = threading.Event()
        arrived = threading.Event()
        store.reader.fetch(0, 6 * MIB, lambda data, error: arrived.set())
        until(lambda: sum(length for *_, length in repository.ranges) >= 6 * MIB - 64 * 1024)
        assert all(length <= RANGE_SIZE_MAX for *_, length in repository.ranges)
        repository.gate.set()
        assert arrived.wait(20)
