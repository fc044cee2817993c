"""Boot packs at attach: right bytes whatever the pack is, and one request where it is good."""

import json
import random
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsnap.blockstore import boot_buffer, boot_stream
from imgsnap.blockstore.boot_choice import AUTO
from imgsnap.digest import sha256_digest
from imgsnap.formats import boot_pack
from imgsnap.oci.media_types import OCI_CONFIG, OCI_MANIFEST
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.units import BLOCK_SIZE
from tests.support.block_store import OpenStore, open_store
from tests.support.boot import (
    PackRepository,
    attach_pack,
    damaged,
    device_bytes,
    pack_bytes,
    trace_of,
)
from tests.support.snapshots import BuiltSnapshot, build_snapshot, random_device

BLOCKS = 1500
_CONFIG = {"mediaType": OCI_CONFIG, "digest": sha256_digest(b"{}"), "size": 2}
IMAGE = json.dumps(
    {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": _CONFIG, "layers": []}
).encode()
"""Of an ordinary image."""
DEFAULT = (AUTO,)


@cache
def sample(seed: int = 7) -> BuiltSnapshot:
    return build_snapshot(random_device(BLOCKS, seed), extents=3)


@cache
def recorded(seed: int = 7) -> tuple[int, ...]:
    """Blocks of a start, in order, some of them side by side."""
    rng = random.Random(seed)
    firsts = rng.sample(range(1, BLOCKS - 4), 120)
    return tuple(dict.fromkeys(block for first in firsts for block in range(first, first + 3)))


@cache
def pack(seed: int = 7) -> bytes:
    with tempfile.TemporaryDirectory() as work:
        return pack_bytes(sample(seed), [trace_of(sample(seed), recorded(seed))], Path(work))


def read(store: OpenStore, block: int, count: int = 1) -> bytes:
    return store.reader.read(block * BLOCK_SIZE, count * BLOCK_SIZE)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_recorded_start_needs_one_request_more(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
        counts = store.statistics.pack
        assert counts.bytes == len(pack())
        assert counts.blocks == len(recorded())
        # Chunks of zeros are no chunks to fetch, so the cache has them before the pack.
        assert counts.blocks * 0.9 < counts.used <= counts.blocks
        assert counts.failures == counts.given_up == 0
        assert store.statistics.demand.requests == store.statistics.readahead.requests == 0
    assert repository.ranges == []
    assert repository.count("open") == repository.count("referrers") == 1


def test_an_images_digest_leads_to_the_pack_of_its_snapshot(tmp_path: Path) -> None:
    image = RawManifest(Descriptor(OCI_MANIFEST, sha256_digest(IMAGE), len(IMAGE)), IMAGE)
    repository = PackRepository()
    repository.add(sample(), tag="", subject=image.descriptor.digest)
    repository.add_manifest(image)
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, image.descriptor.digest, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
    assert repository.ranges == []


def test_what_the_pack_lacks_comes_as_ever(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, boot_pack=DEFAULT, readahead_max=1 << 20) as store:
        for block in recorded()[:9]:
            read(store, block)
        for block in range(0, BLOCKS, 7):
            count = min(9, BLOCKS - block)
            assert read(store, block, count) == device_bytes(sample(), block, count)
        assert store.statistics.pack.served > 0
    assert repository.ranges


def test_covered_reads_open_no_readahead_window(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, boot_pack=DEFAULT, readahead_max=1 << 20) as store:
        for block in recorded():
            read(store, block)
        assert store.statistics.readahead.requests == 0
    assert repository.ranges == []


def test_readers_wait_for_blocks_on_their_way(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    repository.stall_at = len(pack()) - 10
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        block = recorded()[-1]
        got: list[bytes] = []
        store.reader.fetch(
            block * BLOCK_SIZE, BLOCK_SIZE, lambda data, error: got.append(bytes(data or b""))
        )
        wait_until(lambda: store.statistics.pack.waits == 1)
        assert not got and not repository.ranges
        repository.go_on.set()
        wait_until(lambda: bool(got))
        assert got == [device_bytes(sample(), block, 1)]
    assert repository.ranges == []


def test_a_stalled_stream_lets_its_readers_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot_buffer, "PATIENCE_S", 0.05)
    monkeypatch.setattr(boot_stream, "WATCH_S", 0.01)
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    repository.stall_at = len(pack()) // 2
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
        assert store.statistics.pack.given_up
        assert repository.ranges
        repository.go_on.set()


@pytest.mark.parametrize("stall_at", [0, 64, 100])
def test_a_pack_that_never_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stall_at: int
) -> None:
    monkeypatch.setattr(boot_buffer, "PATIENCE_S", 0.05)
    monkeypatch.setattr(boot_stream, "WATCH_S", 0.01)
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    repository.stall_at = stall_at
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert read(store, 1, BLOCKS - 1) == device_bytes(sample(), 1, BLOCKS - 1)
        repository.go_on.set()


UNREAD = {11, *range(12, 20), *range(48, 64)}
"""Bytes of the header that this version has no use for: reserved, compat and ro_compat."""


@settings(max_examples=60, deadline=None)
@given(
    fault=st.sampled_from(["none", "cut", "flip", "foreign", "noise"]),
    place=st.integers(0, 1 << 20),
    reads=st.lists(
        st.tuples(st.integers(0, BLOCKS * BLOCK_SIZE - 1), st.integers(1, 70_000)), max_size=25
    ),
    readahead=st.sampled_from([0, 1 << 20]),
)
def test_right_bytes_whatever_the_pack_is(
    fault: str, place: int, reads: list[tuple[int, int]], readahead: int
) -> None:
    repository = PackRepository(sample(), piece=1 + place % 50_000)
    data, unread = pack(), False
    if fault == "cut":
        repository.cut_at = place % len(data)
    elif fault == "flip":
        data = damaged(data, place)
        unread = place % len(data) in UNREAD
    elif fault == "foreign":
        data = pack(8)
    elif fault == "noise":
        data = random.Random(place).randbytes(5000)
    attach_pack(repository, sample(), data)
    with (
        tempfile.TemporaryDirectory() as cache,
        open_store(repository, Path(cache), boot_pack=DEFAULT, readahead_max=readahead) as store,
    ):
        for block in recorded()[::3]:
            assert read(store, block) == device_bytes(sample(), block, 1)
        for offset, length in reads:
            assert store.reader.read(offset, length) == sample().device[offset : offset + length]
        assert store.boot is not None
        wait_until(lambda: store.boot.ended)
        assert store.statistics.pack.failures == (fault != "none" and not unread)


def test_hashes_of_the_table_that_are_wrong(tmp_path: Path) -> None:
    """A table that fits its blocks, but leads to another root."""
    header = boot_pack.Header.parse(pack())
    start = boot_pack.Header.SIZE
    raw = pack()[start : start + header.table_length]
    table = boot_pack.decode_table(header, raw)
    extent = table.extents[0]
    assert extent.proof
    wrong = extent._replace(proof=(bytes(32), *extent.proof[1:]))
    forged = boot_pack.BootTable((wrong, *table.extents[1:]), table.frames)
    data = boot_pack.encode(forged) + pack()[start + header.table_length :]
    repository = PackRepository(sample())
    attach_pack(repository, sample(), data)
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
        assert store.statistics.pack.failures == 1
        assert store.statistics.pack.blocks == 0


def test_a_second_attach_asks_nobody(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        read(store, recorded()[-1])
        assert store.boot is not None
        wait_until(lambda: store.boot.ended)
    repository.faults.away = 1
    with open_store(repository, tmp_path, sample().digest, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
        assert store.statistics.pack.bytes == 0


def test_a_damaged_copy_in_the_cache_is_dropped(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    digest = attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None
        wait_until(lambda: store.boot.ended)
        path = store.cache.boot_pack_path(digest)
    assert path.read_bytes() == pack()
    path.write_bytes(damaged(pack(), len(pack()) * 2 // 3))
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        for block in recorded():
            assert read(store, block) == device_bytes(sample(), block, 1)
    assert not path.exists()


def test_everything_local_asks_nobody(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path) as store:
        store.reader.warm()
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None and not store.boot.found(20)
        assert read(store, recorded()[0]) == device_bytes(sample(), recorded()[0], 1)
    assert repository.count("open") == repository.count("referrers") == 0


def test_blocks_that_are_all_local_are_not_streamed(tmp_path: Path) -> None:
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    with open_store(repository, tmp_path) as store:
        for block in recorded():
            read(store, block)
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None
        wait_until(lambda: store.boot.ended)
        assert store.statistics.pack.blocks == store.statistics.pack.failures == 0


def test_no_pack_and_no_answer(tmp_path: Path) -> None:
    with open_store(PackRepository(sample()), tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None and not store.boot.found(20)
        assert read(store, 5, 20) == device_bytes(sample(), 5, 20)


def test_the_trace_of_a_store(tmp_path: Path) -> None:
    with open_store(PackRepository(sample()), tmp_path, trace=True) as store:
        for block in (300, 17, 18, 17, 200):
            read(store, block)
        read(store, 0)  # metadata
        trace = store.reader.trace()
    expected = trace_of(sample(), (300, 17, 18, 200))
    named = [(trace.extents[t.extent], t.first, t.blocks) for t in trace.touches]
    assert named == [(expected.extents[t.extent], t.first, t.blocks) for t in expected.touches]
    assert trace.complete


def test_the_absence_of_a_pack_is_remembered_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = PackRepository(sample())
    for _ in range(2):
        with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
            assert store.boot is not None and not store.boot.found(20)
    assert repository.count("referrers") == 1
    attach_pack(repository, sample(), pack())
    monkeypatch.setattr(boot_stream, "CHOICE_AGE_S", -1.0)
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None and not store.boot.found(20)  # not waited for
        wait_until(lambda: store.boot.ended)
    assert repository.count("referrers") == 2
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        assert store.boot is not None and store.boot.found(20)
        assert read(store, recorded()[-1]) == device_bytes(sample(), recorded()[-1], 1)
        assert store.statistics.pack.blocks == len(recorded())


def test_who_reads_far_ahead_does_not_wait_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boot_buffer, "WAIT_MAX_S", 0.0)
    repository = PackRepository(sample())
    attach_pack(repository, sample(), pack())
    repository.stall_at = len(pack()) - 10
    with open_store(repository, tmp_path, boot_pack=DEFAULT) as store:
        wait_until(lambda: store.statistics.pack.blocks > 0)
        for block in recorded()[-9:]:
            assert read(store, block) == device_bytes(sample(), block, 1)
        assert repository.ranges
        repository.go_on.set()
