"""The reader against the flat bytes: random reads under faults, damaged caches, full disks."""

import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.errors import FormatError, ImgsnapError, InvalidArgument
from imgsnap.units import MIB
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 900
SIZE = BLOCKS * 4096


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(BLOCKS, seed=11), extents=3, metadata_blocks=2)


FAULT = st.sampled_from(["", "", "", "away", "corrupt", "truncate", "no_ranges", "corrupt_next"])
READS = st.lists(
    st.tuples(FAULT, st.integers(0, SIZE + 5000), st.integers(0, 300_000)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(reads=READS)
def test_right_bytes_or_an_error_never_others(built, tmp_path_factory, reads):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path_factory.mktemp("cache"), readahead_max=MIB) as store:
        seen = False  # a read may join a transfer that began under an earlier fault
        for fault, offset, length in reads:
            seen = seen or bool(fault)
            if fault:
                setattr(repository.faults, fault, 1)
            try:
                data = store.reader.read(offset, length)
            except ImgsnapError:
                assert seen
            else:
                assert data == built.device[offset : offset + length]
            for name in ("away", "corrupt", "truncate", "no_ranges", "corrupt_next"):
                setattr(repository.faults, name, 0)
        assert read_at_last(store.reader) == built.device


def read_at_last(reader):
    """The whole device, once transfers that began under a fault have failed."""
    for _ in range(20):
        try:
            return reader.read(0, SIZE)
        except ImgsnapError:
            threading.Event().wait(0.01)
    return reader.read(0, SIZE)


def test_the_end_of_the_device_is_short(built, tmp_path):
    with open_store(MemoryRepository(built), tmp_path) as store:
        assert store.reader.size == SIZE
        assert store.reader.read(SIZE - 10, 100) == built.device[-10:]
        assert store.reader.read(SIZE, 1) == b""
        assert store.reader.read(SIZE + 99, 1) == b""
        with pytest.raises(InvalidArgument):
            store.reader.read(-1, 5)


def test_zero_chunks_are_neither_fetched_nor_stored(tmp_path):
    built = build_snapshot(random_device(4)[:4096] + bytes(400 * 4096), extents=1)
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, 401 * 4096) == built.device
        assert store.reader.complete
    assert repository.ranges == []
    (data,) = tmp_path.glob("v1/extents/*/data")
    assert data.stat().st_blocks == 0


def test_warm_makes_the_registry_unnecessary(built, tmp_path):
    repository = MemoryRepository(built)
    steps = []
    with open_store(repository, tmp_path) as store:
        store.reader.warm(lambda done, total: steps.append((done, total)))
        assert store.reader.complete
        repository.faults.away = 1
        assert store.reader.read(0, SIZE) == built.device
        assert store.statistics.misses == 0
    assert steps[-1] == (SIZE, SIZE)
    assert steps == sorted(steps)


def damage(path, kind):
    raw = bytearray(path.read_bytes())
    if kind == "flip":
        for at in range(100, len(raw), 50_000):
            raw[at] ^= 1
    elif kind == "zero":
        raw[len(raw) // 3 : len(raw) // 2] = bytes(len(raw) // 2 - len(raw) // 3)
    elif kind == "truncate":
        raw = raw[: len(raw) // 2]
    elif kind == "empty":
        raw = bytearray()
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["data", "present"])
@pytest.mark.parametrize("kind", ["flip", "zero", "truncate", "empty", "delete"])
def test_a_damaged_cache_is_refetched(built, tmp_path, name, kind, caplog):
    with open_store(MemoryRepository(built), tmp_path) as store:
        store.reader.warm()
    for path in tmp_path.glob(f"v1/extents/*/{name}"):
        if kind == "delete":
            path.unlink()
        else:
            damage(path, kind)
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, SIZE) == built.device
    if name == "data":
        assert repository.ranges
        assert "damaged" in caplog.text or "discarding" in caplog.text
    with open_store(MemoryRepository(), tmp_path, built.digest) as store:
        assert store.reader.read(0, SIZE) == built.device, "and the cache is whole again"


def test_a_presence_map_that_lies_is_found_out(built, tmp_path):
    with open_store(MemoryRepository(built), tmp_path):
        pass
    for path in tmp_path.glob("v1/extents/*/present"):
        raw = path.read_bytes()
        path.write_bytes(raw[: PresenceHeader.SIZE] + b"\1" * (len(raw) - PresenceHeader.SIZE))
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, SIZE) == built.device
    assert repository.ranges


@pytest.mark.parametrize("size", [0, 4096, 1_000_000])
def test_a_cache_cut_off_while_in_use_is_fetched_again(built, tmp_path, size):
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        store.reader.warm()
        for path in tmp_path.glob("v1/extents/*/data"):
            os.truncate(path, min(size, path.stat().st_size))
        assert store.reader.read(0, SIZE) == built.device


def test_a_chunk_said_to_be_zeros_that_is_not_is_an_error(tmp_path):
    from array import array

    from imgsnap.formats.chunk_map import ZERO_PACK
    from imgsnap.formats.chunk_map_codec import encode

    built = build_snapshot(random_device(200, seed=5), extents=1, packs=1)
    (extent,) = built.chunk_map.extents
    row = next(row for row, pack in enumerate(extent.pack) if pack != ZERO_PACK)
    for column, value in ((extent.pack, ZERO_PACK), (extent.offset, 0), (extent.length, 0)):
        assert isinstance(column, array)
        column[row] = value
    assert encode(built.chunk_map)
    repository = MemoryRepository(lying(built))
    with (
        open_store(repository, tmp_path) as store,
        pytest.raises(ImgsnapError, match="not one of zeros"),
    ):
        store.reader.read(4096 + sum(extent.blocks[:row]) * 4096, 4096)


def lying(built):
    """The snapshot with a manifest for its changed chunk map."""
    import dataclasses
    import json

    from imgsnap.digest import sha256_digest
    from imgsnap.formats.chunk_map_codec import encode
    from imgsnap.formats.frame import compress
    from imgsnap.oci import media_types
    from imgsnap.oci.repository import RawManifest

    blob = compress(encode(built.chunk_map), 3)
    value = json.loads(built.manifest.raw)
    for layer in value["layers"]:
        if layer["mediaType"] == media_types.CHUNK_MAP:
            layer |= {"digest": sha256_digest(blob), "size": len(blob)}
    raw = json.dumps(value).encode()
    descriptor = dataclasses.replace(built.manifest.descriptor, digest=sha256_digest(raw))
    return dataclasses.replace(
        built,
        manifest=RawManifest(descriptor, raw),
        blobs=built.blobs | {sha256_digest(blob): blob},
    )


def test_parallel_random_and_sequential_readers_get_right_bytes(built, tmp_path):
    import random

    repository = MemoryRepository(built)
    repository.faults.latency_ms = 2
    wrong = []

    def run(number: int, reader) -> None:
        rng = random.Random(number)
        at = rng.randrange(SIZE)
        for _ in range(60):
            length = rng.choice((1, 512, 4096, 20_000, 131_072))
            at = (at if number % 2 else rng.randrange(SIZE)) % SIZE
            data = reader.read(at, length)
            if data != built.device[at : at + length]:
                wrong.append((number, at, length))
            at += length

    with open_store(repository, tmp_path, readahead_max=MIB) as store:
        threads = [threading.Thread(target=run, args=(n, store.reader)) for n in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert sum(length for *_, length in repository.ranges) < len(built.device) * 1.2


def test_two_processes_share_one_cache(built, tmp_path):
    """A child reads every other piece while we read all of it; both compare every byte."""
    pieces = list(range(0, SIZE, 40_000))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open_store(MemoryRepository(built), tmp_path) as store:
                same = all(
                    store.reader.read(at, 40_000) == built.device[at : at + 40_000]
                    for at in reversed(pieces)
                )
                status = 0 if same else 2
        finally:
            os._exit(status)
    with open_store(MemoryRepository(built), tmp_path) as store:
        for at in pieces:
            assert store.reader.read(at, 40_000) == built.device[at : at + 40_000]
    assert os.waitpid(child, 0)[1] == 0
    last = MemoryRepository(built)
    with open_store(last, tmp_path) as store:
        assert store.reader.read(0, SIZE) == built.device
    assert last.ranges == []


def test_a_second_process_finds_what_the_first_fetched_later(built, tmp_path):
    with open_store(MemoryRepository(built), tmp_path) as early:
        with open_store(MemoryRepository(built), tmp_path) as other:
            other.reader.warm()
        assert early.reader.read(0, SIZE) == built.device
        assert early.statistics.demand.requests == 0


@pytest.mark.parametrize(
    "raw", [b"", b"\0" * 64, b"IMGSNPPR" + b"\0" * 56, b"IMGSNPPR\x01\0" + b"\0" * 54]
)
def test_presence_headers_are_checked(raw):
    with pytest.raises(FormatError):
        PresenceHeader.parse(raw)


def test_presence_header_round_trip():
    header = PresenceHeader(7, 99, "ab" * 32)
    assert PresenceHeader.parse(header.pack()) == header
