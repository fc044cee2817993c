"""What the fetcher asks for, in which order, and what it does about failures."""

import threading

import pytest

from imgsnap.blockstore.fetch_queue import RANGE_SIZE_MAX, Priority
from imgsnap.errors import IntegrityError, NotFound, Unavailable
from imgsnap.formats.chunk_map import ZERO_PACK
from imgsnap.units import BLOCK_SIZE, KIB, MIB
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 1500


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(BLOCKS), extents=2, packs=2)


def frames(built):
    """(row's device offset, size, pack digest, frame offset, frame length) of stored chunks."""
    found = []
    for extent, stated in zip(built.chunk_map.extents, built.config.extents, strict=True):
        block = stated.base_block
        for row, blocks in enumerate(extent.blocks):
            if extent.pack[row] != ZERO_PACK:
                place = built.chunk_map.place(extent, row)
                found.append(
                    (block * 4096, blocks * 4096, place.pack.digest, place.offset, place.length)
                )
            block += blocks
    return found


def test_neighbouring_frames_are_one_bounded_range(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, len(built.device)) == built.device
        stored = frames(built)
    assert len(repository.ranges) < len(stored) / 5
    assert all(length <= RANGE_SIZE_MAX for _, _, length in repository.ranges)
    covered = {(digest, at) for digest, at, _ in repository.ranges}
    assert len(covered) == len(repository.ranges)
    for _, _, digest, offset, length in stored:
        hits = [
            1
            for pack, start, size in repository.ranges
            if pack == digest and start <= offset and offset + length <= start + size
        ]
        assert len(hits) == 1, "each frame is transferred exactly once"


def test_many_readers_of_one_chunk_make_one_request(built, tmp_path):
    repository = MemoryRepository(built)
    offset, size, *_ = frames(built)[0]
    with open_store(repository, tmp_path) as store:
        repository.gate = threading.Event()
        results = []
        threads = [
            threading.Thread(
                target=lambda at: results.append((at, store.reader.read(at, 4096))),
                args=(offset + number * BLOCK_SIZE % size,),
            )
            for number in range(12)
        ]
        for thread in threads:
            thread.start()
        repository.gate.set()
        for thread in threads:
            thread.join(20)
    assert len(results) == 12
    assert all(data == built.device[at : at + 4096] for at, data in results)
    assert len(repository.ranges) == 1


def spread(stored, count):
    """Chunks far from each other, so that none of them coalesce."""
    return stored[:: max(1, len(stored) // count)][:count]


def test_demand_goes_before_queued_prefetch(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=1) as store:
        repository.gate = threading.Event()
        wanted = frames(built)[-1]
        warming = threading.Thread(target=store.reader.warm)
        warming.start()
        while not repository.ranges:  # the one thread now hangs in a prefetch
            warming.join(0.005)
        arrived = threading.Event()
        store.reader.fetch(wanted[0], 4096, lambda data, error: arrived.set())
        repository.gate.set()
        assert arrived.wait(20)
        warming.join(20)
    second = repository.ranges[1]
    assert second[0] == wanted[2]
    assert second[1] <= wanted[3] < second[1] + second[2]
    assert store.statistics.demand.requests == 1
    assert store.statistics.prefetch.requests > 1


def test_background_work_leaves_threads_for_demand(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=4) as store:
        repository.gate = threading.Event()
        source = store.reader._parts[1].source
        rows = [row for row in range(len(source.extent)) if source.place(row)]
        # Rows far apart: each needs its own request.
        for row in rows:
            store.fetcher.hint([(source, row)], Priority.PREFETCH)
        for _ in range(200):
            if len(repository.ranges) == 2:
                break
            threading.Event().wait(0.01)
        assert len(repository.ranges) == 2, "two of four threads are reserved"
        done = threading.Event()
        stored = frames(built)[-1]
        store.reader.fetch(stored[0], 4096, lambda data, error: done.set())
        for _ in range(200):
            if len(repository.ranges) == 3:
                break
            threading.Event().wait(0.01)
        assert repository.ranges[2][0] == stored[2]
        repository.gate.set()
        assert done.wait(20)


def test_a_frame_damaged_in_transfer_is_asked_for_again(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        offset, size, digest, at, length = frames(built)[2]
        repository.faults.corrupt_next = 1
        assert store.reader.read(offset, size) == built.device[offset : offset + size]
        assert repository.ranges == [(digest, at, length)] * 2
        assert store.statistics.source_damage == 1


def test_a_frame_damaged_in_the_store_is_an_error_that_names_it(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        offset, size, digest, at, _ = frames(built)[2]
        repository.faults.corrupt = 1
        with pytest.raises(IntegrityError) as caught:
            store.reader.read(offset, size)
        chunk = store.snapshot.chunk_map.extents[0].chunk_id(2)
        assert digest in str(caught.value)
        assert f"offset {at}" in str(caught.value)
        assert chunk.hex() in str(caught.value) or "chunk" in str(caught.value)
        repository.faults.corrupt = 0
        assert store.reader.read(offset, size) == built.device[offset : offset + size]


def test_one_damaged_frame_does_not_fail_its_neighbours(built, tmp_path):
    repository = MemoryRepository(built)
    damaged = frames(built)[1]
    pack = bytearray(repository.blobs[damaged[2]])
    pack[damaged[3] + damaged[4] // 2] ^= 0xFF
    repository.blobs[damaged[2]] = bytes(pack)
    outcomes: dict[int, object] = {}
    with open_store(repository, tmp_path, threads=1) as store:
        repository.gate = threading.Event()
        arrived = threading.Semaphore(0)
        for offset, *_ in frames(built)[:3]:

            def done(data, error, offset=offset):
                outcomes[offset] = error or bytes(data)
                arrived.release()

            store.reader.fetch(offset, 4096, done)
        repository.gate.set()
        for _ in range(3):
            assert arrived.acquire(timeout=20)
    for offset, *_ in frames(built)[:3]:
        if offset == damaged[0]:
            assert isinstance(outcomes[offset], IntegrityError)
        else:
            assert outcomes[offset] == built.device[offset : offset + 4096]


def test_a_server_without_ranges_sends_each_pack_once(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    with open_store(repository, tmp_path) as store:
        threads = [
            threading.Thread(target=store.reader.read, args=(offset, size))
            for offset, size, *_ in spread(frames(built), 20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert store.reader.read(0, len(built.device)) == built.device
    assert repository.count("open") == 2
    with open_store(repository, tmp_path / "again") as store:
        repository.faults.corrupt = 1
        with pytest.raises(IntegrityError):
            store.reader.read(frames(built)[0][0], 4096)
        repository.faults.corrupt = 0
        assert store.reader.read(0, len(built.device)) == built.device


def test_a_damaged_local_pack_is_replaced(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    offset, size, digest, at, length = frames(built)[0]
    with open_store(repository, tmp_path) as store:
        store.reader.read(offset, size)
        path = store.cache.pack_path(digest)
    raw = bytearray(path.read_bytes())
    raw[at + length // 2] ^= 0xFF
    path.write_bytes(raw)
    extents = tmp_path / "v1/extents"
    for present in extents.glob("*/present"):
        present.unlink()
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(offset, size) == built.device[offset : offset + size]


def test_errors_of_the_repository_reach_the_reader_and_do_not_stick(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        offset = frames(built)[0][0]
        repository.faults.away = 1
        with pytest.raises(Unavailable):
            store.reader.read(offset, 4096)
        repository.faults.away = 0
        assert store.reader.read(offset, 4096) == built.device[offset : offset + 4096]
        missing = frames(built)[-1]
        kept = repository.blobs.pop(missing[2])
        with pytest.raises(NotFound):
            store.reader.read(missing[0], 4096)
        repository.blobs[missing[2]] = kept
        assert store.reader.read(missing[0], 4096) == built.device[missing[0] :][:4096]


def test_a_truncated_transfer_is_never_served(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        repository.faults.truncate = 1
        with pytest.raises(Unavailable):
            store.reader.read(frames(built)[0][0], 4096)


def test_an_overdue_read_fails_and_its_late_chunk_is_kept(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, deadline_s=-1.0) as store:
        repository.gate = threading.Event()
        outcome = []
        offset = frames(built)[0][0]
        store.reader.fetch(offset, 4096, lambda data, error: outcome.append(error))
        while not repository.ranges:
            threading.Event().wait(0.005)
        assert store.fetcher.expire() == 1
        assert isinstance(outcome[0], Unavailable)
        repository.gate.set()
        for _ in range(500):
            if store.reader.read_into(memoryview(bytearray(4096)), offset):
                break
            threading.Event().wait(0.01)
        assert len(outcome) == 1
        assert len(repository.ranges) == 1


def test_what_nobody_waits_for_any_more_is_not_asked_for(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=1, deadline_s=-1.0) as store:
        repository.gate = threading.Event()
        first, *others = spread(frames(built), 4)
        store.reader.fetch(first[0], 4096, lambda data, error: None)
        while not repository.ranges:
            threading.Event().wait(0.005)
        for offset, *_ in others:
            store.reader.fetch(offset, 4096, lambda data, error: None)
        assert store.fetcher.expire() == 4
        repository.gate.set()
        store.reader._deadline_s = 20.0
        last = frames(built)[-1][0]
        assert store.reader.read(last, 4096) == built.device[last : last + 4096]
        assert len(repository.ranges) == 2


def test_closing_fails_those_who_wait(built, tmp_path):
    repository = MemoryRepository(built)
    outcome = []
    with open_store(repository, tmp_path, threads=1) as store:
        repository.gate = threading.Event()
        for offset, *_ in spread(frames(built), 4):
            store.reader.fetch(offset, 4096, lambda data, error: outcome.append(error))
        threading.Timer(0.2, repository.gate.set).start()
        store.fetcher.close()
        assert len(outcome) == 4
        assert all(isinstance(error, Unavailable) for error in outcome)
        store.reader.fetch(frames(built)[9][0], 4096, lambda data, error: outcome.append(error))
        assert isinstance(outcome[4], Unavailable)


def test_sequential_reads_keep_several_ranges_in_flight(tmp_path):
    built = build_snapshot(random_device(6000, seed=3), extents=1, packs=1)
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, readahead_max=8 * MIB) as store:
        step = 128 * KIB
        read = b"".join(store.reader.read(at, step) for at in range(0, len(built.device), step))
        assert read == built.device
        assert store.statistics.readahead.chunks > store.statistics.demand.chunks * 5


def test_a_reader_who_joined_a_failing_prefetch_gets_an_attempt_of_its_own(built, tmp_path):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path, threads=1) as store:
        repository.gate = threading.Event()
        source = store.reader._parts[1].source
        offset = frames(built)[0][0]
        store.fetcher.hint([(source, 0)], Priority.PREFETCH)
        while not repository.ranges:
            threading.Event().wait(0.005)
        outcome = []
        arrived = threading.Event()

        def done(data, error):
            outcome.append(error or bytes(data))
            arrived.set()

        store.reader.fetch(offset, 4096, done)
        repository.faults.truncate = 1
        fail_once = repository.read_range

        def read_range(*arguments):
            repository.faults.truncate = 0
            return fail_once(*arguments)

        repository.read_range = read_range  # the next request is well again
        repository.gate.set()
        assert arrived.wait(20)
        assert outcome == [built.device[offset : offset + 4096]]
        assert len(repository.ranges) == 2


def test_a_pack_that_came_while_a_range_was_refused_is_not_fetched_again(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    first, second = frames(built)[0], frames(built)[5]
    assert first[2] == second[2]
    refused = repository.read_range
    with open_store(repository, tmp_path, threads=2) as store:
        slow, go = threading.Event(), threading.Event()

        def read_range(descriptor, offset, length):
            if offset == second[3]:
                slow.set()
                go.wait(20)
            return refused(descriptor, offset, length)

        repository.read_range = read_range
        arrived = threading.Event()
        store.reader.fetch(second[0], 4096, lambda data, error: arrived.set())
        assert slow.wait(20)
        store.reader.read(first[0], 4096)
        go.set()
        assert arrived.wait(20)
    assert repository.count("open") == 1
