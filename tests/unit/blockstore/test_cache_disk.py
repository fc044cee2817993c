"""A real full disk: a small tmpfs under the cache. Reading goes on, uncached; needs root."""

import os
import subprocess
from contextlib import contextmanager

import pytest

from imgsnap.blockstore.cache_pins import pin_snapshot
from imgsnap.blockstore.cache_usage import scan, snapshots
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.errors import ImgsnapError
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 500

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(BLOCKS, seed=9), extents=2, metadata_blocks=3)


@contextmanager
def small_disk(directory, size):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "cache", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("room", [0, 4096, 8192, 16384, 40960, 81920, 300_000])
def test_a_full_disk_is_read_through(built, tmp_path, room):
    """Whatever fits is kept: blobs, maps, metadata, extents, tags give way one after the other."""
    with small_disk(tmp_path, max(room, 4096)) as disk:
        if not room:
            (disk / "filler").write_bytes(bytes(4096))
        for _ in range(2):
            with open_store(MemoryRepository(built), disk) as store:
                for _ in range(2):
                    assert store.reader.read(0, BLOCKS * 4096) == built.device
        cache = NodeCache(disk)
        snapshots(cache, scan(cache))


@pytest.mark.parametrize("room", ["64k", "1m", "16m"])
def test_servers_without_ranges(built, tmp_path, room):
    """Whole packs, on disk or in memory."""
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    with small_disk(tmp_path, room) as disk, open_store(repository, disk) as store:
        for _ in range(2):
            for offset in range(0, BLOCKS * 4096, 100_000):
                data = store.reader.read(offset, 100_000)
                assert data == built.device[offset : offset + 100_000]


def test_it_stores_again_when_there_is_room(built, tmp_path):
    with small_disk(tmp_path, "8m") as disk, open_store(MemoryRepository(built), disk) as store:
        filler = disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert store.reader.read(0, BLOCKS * 4096) == built.device
        assert store.statistics.unstored > 0
        filler.unlink()
        store.reader.warm()
        assert store.reader.complete


def test_a_pin_that_cannot_be_kept_is_an_error(built, tmp_path):
    with small_disk(tmp_path, "64k") as disk, open_store(MemoryRepository(built), disk) as store:
        store.reader.read(0, BLOCKS * 4096)
        with pytest.raises(ImgsnapError):
            pin_snapshot(store.cache, store.snapshot, "me")
        assert list((store.cache.root / "pins").iterdir()) == []
