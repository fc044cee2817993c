"""Ranges whose first byte is late: asked for again within a budget, counted once."""

import threading
from contextlib import contextmanager

import pytest

from imgsnap.blockstore import flights as flights_module
from imgsnap.blockstore.fetch_queue import Priority
from imgsnap.errors import Unavailable
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device
from tests.unit.blockstore.test_fetcher import frames, spread


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(1500), extents=2, packs=2)


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(flights_module, "HEDGE_AFTER_UNKNOWN_S", 0.05)


class SlowRepository(MemoryRepository):
    """Whose ranges named in `hang` send nothing until they are given up or `go` is set."""

    def __init__(self, *snapshots) -> None:
        super().__init__(*snapshots)
        self.hang = lambda second: False
        self.go = threading.Event()
        self.given_up = threading.Semaphore(0)
        self.seconds = 0

    @contextmanager
    def open_range(self, descriptor, offset, length, *, cancellation=None, second=False):
        self.seconds += second
        if self.hang(second):
            self._request("range", descriptor.digest, offset, length)
            while not self.go.is_set():
                if cancellation.cancelled:
                    self.given_up.release()
                    cancellation.check()
                self.go.wait(0.01)
        with super().open_range(
            descriptor, offset, length, cancellation=cancellation, second=second
        ) as stream:
            yield stream


def test_a_late_range_is_asked_for_again_and_the_loser_given_up(built, tmp_path):
    repository = SlowRepository(built)
    repository.hang = lambda second: not second
    with open_store(repository, tmp_path) as store:
        offset, size, *_ = frames(built)[3]
        assert store.reader.read(offset, size) == built.device[offset : offset + size]
        assert repository.given_up.acquire(timeout=20)
        assert store.statistics.hedges == 1
        assert store.statistics.demand.chunks == 1
        assert store.statistics.failures == 0
        assert repository.ranges[0] == repository.ranges[1]


def test_the_first_range_may_win_too(built, tmp_path):
    repository = SlowRepository(built)
    hung = []

    def hang(second):
        hung.append(second)
        if second:
            repository.hang = lambda second: True
            threading.Timer(0.05, repository.go.set).start()
        return True

    repository.hang = hang
    with open_store(repository, tmp_path) as store:
        offset, size, *_ = frames(built)[3]
        assert store.reader.read(offset, size) == built.device[offset : offset + size]
    assert hung == [False, True]
    assert store.statistics.demand.chunks == 1


def test_a_failing_hedge_leaves_the_first_range_alone(built, tmp_path):
    repository = SlowRepository(built)

    def hang(second):
        if second:
            threading.Timer(0.05, repository.go.set).start()
            raise Unavailable("no second answer")
        return True

    repository.hang = hang
    with open_store(repository, tmp_path) as store:
        offset, size, *_ = frames(built)[3]
        assert store.reader.read(offset, size) == built.device[offset : offset + size]
        assert store.statistics.failures == 0


def test_hedges_have_a_budget(built, tmp_path):
    repository = SlowRepository(built)
    repository.hang = lambda second: True
    with open_store(repository, tmp_path) as store:
        done = threading.Semaphore(0)
        reads = spread(frames(built), 12)
        for offset, *_ in reads:
            store.reader.fetch(offset, 4096, lambda data, error: done.release())
        threading.Event().wait(0.5)
        assert repository.seconds <= flights_module.HEDGE_BURST + 1
        assert repository.seconds >= 1
        repository.go.set()
        for _ in reads:
            assert done.acquire(timeout=20)


def test_a_background_range_is_hedged_once_a_reader_waits_for_it(built, tmp_path):
    repository = SlowRepository(built)
    repository.hang = lambda second: not second
    with open_store(repository, tmp_path) as store:
        source = store.reader._parts[1].source
        offset, size, *_ = frames(built)[0]
        store.fetcher.hint([(source, 0)], Priority.PREFETCH)
        while not repository.ranges:
            threading.Event().wait(0.005)
        threading.Event().wait(0.2)
        assert repository.seconds == 0
        assert store.reader.read(offset, size) == built.device[offset : offset + size]
        assert repository.seconds == 1


def test_closing_ends_ranges_that_hang(built, tmp_path):
    repository = SlowRepository(built)
    repository.hang = lambda second: True
    with open_store(repository, tmp_path) as store:
        failed = threading.Event()
        store.reader.fetch(frames(built)[0][0], 4096, lambda data, error: failed.set())
        while not repository.ranges:
            threading.Event().wait(0.005)
        store.fetcher.close()
        assert failed.is_set()
        assert not any(thread.is_alive() for thread in store.fetcher._threads)
