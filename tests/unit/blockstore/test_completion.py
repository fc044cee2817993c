"""Background completion: when it begins, what it asks for, how fast, and that readers go first."""

import random
import threading

import pytest

from imgsnap.blockstore import completion
from imgsnap.units import KIB, MIB
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot
from tests.unit.blockstore.test_background import until
from tests.unit.blockstore.test_fetcher import frames

SIZE = 8 * MIB


@pytest.fixture(scope="module")
def built():
    device = random.Random(6).randbytes(SIZE)
    return build_snapshot(device, extents=2, packs=2, chunk_blocks=(8,))


def test_all_fetches_everything_after_the_first_read_that_waits(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, prefetch="all") as store:
        assert store.reader.read(0, 4096) == built.device[:4096]
        assert not repository.ranges  # the metadata is here: nobody waited
        offset = frames(built)[10][0]
        store.reader.read(offset, 4096)
        until(lambda: store.reader.complete)
        count = len(repository.ranges)
        assert store.reader.read(0, SIZE) == built.device
        assert len(repository.ranges) == count
        assert store.statistics.prefetch.chunks + store.statistics.demand.chunks == len(
            frames(built)
        )


@pytest.mark.parametrize(
    ("mode", "share", "all_of_it"),
    [
        ("off", 0.9, False),
        ("pack", 0.1, False),
        ("pack", 0.6, True),
        ("all", 0.01, True),
    ],
)
def test_it_begins_when_most_has_been_read(built, tmp_path, mode, share, all_of_it):
    repository = MemoryRepository(built)
    stored = frames(built)
    with open_store(repository, tmp_path, prefetch=mode) as store:
        for offset, *_ in stored[: int(len(stored) * share) + 1]:
            store.reader.read(offset, 4096)
        if all_of_it:
            until(lambda: store.reader.complete)
        else:
            threading.Event().wait(0.1)
            assert store.statistics.prefetch.requests == 0


@pytest.mark.parametrize("mode", ["off", "pack"])
def test_more_is_read_ahead_where_much_has_been_read(built, tmp_path, mode):
    """Unless nothing is to be brought in that was not asked for."""
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, prefetch=mode, readahead_max=MIB) as store:
        windows = []
        after = store.reader._readahead.after
        store.reader._readahead.after = lambda *read: windows.append(after(*read)) or windows[-1]
        for number, share in enumerate((0.1, 0.25, 0.4, 0.55, 0.7)):  # far apart: five streams
            # a read that may find its bytes here, brought by its own readahead, and one that missed
            store.reader.read_into(memoryview(bytearray(4096)), int(SIZE * share))
            store.reader.fetch(int(SIZE * share), 4096, lambda data, error: None)
            counts = store.statistics
            wanted = (number + 1) * 16  # chunks of 32 KiB
            until(lambda c=counts, w=wanted: c.demand.chunks + c.readahead.chunks >= w)
        sizes = [end - start for start, end in windows]
    assert sizes[:3] == [512 * KIB] * 3  # 34 of 256 chunks came before the third
    assert sizes[4] == (512 * KIB if mode == "off" else MIB)


def test_a_reader_goes_before_what_completion_has_queued(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=1, prefetch="all") as store:
        stored = frames(built)
        store.reader.read(stored[0][0], 4096)
        repository.gate = threading.Event()
        before = len(repository.ranges)
        until(lambda: len(repository.ranges) > before or store.reader.complete)
        arrived = threading.Event()
        last = stored[-1]
        store.reader.fetch(last[0], 4096, lambda data, error: arrived.set())
        at = len(repository.ranges)
        repository.gate.set()
        assert arrived.wait(20)
        until(lambda: store.reader.complete)
    following = repository.ranges[at][1], repository.ranges[at][2]
    assert following[0] <= last[3] < sum(following)


def test_the_rate_is_kept(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, prefetch="all", prefetch_rate=64 * KIB) as store:
        store.reader.read(frames(built)[0][0], 4096)
        until(lambda: store.statistics.prefetch.chunks >= completion.BATCH_ROWS - 1)
        threading.Event().wait(0.2)  # the next batch is due in half a minute
        assert store.statistics.prefetch.chunks <= completion.BATCH_ROWS


def test_a_failed_batch_is_asked_for_again(built, tmp_path, monkeypatch):
    monkeypatch.setattr(completion, "AGAIN_S", 0.05)
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, prefetch="all") as store:
        repository.vanish_after = 2
        store.reader.read(frames(built)[0][0], 4096)
        until(lambda: repository.faults.away and store.statistics.failures)
        repository.vanish_after, repository.faults.away = None, 0
        until(lambda: store.reader.complete)


def test_closing_ends_it(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.latency_ms = 20
    before = threading.active_count()
    with open_store(repository, tmp_path, prefetch="all") as store:
        store.reader.read(frames(built)[0][0], 4096)
    count = len(repository.ranges)
    threading.Event().wait(0.2)
    assert len(repository.ranges) == count
    assert threading.active_count() <= before
