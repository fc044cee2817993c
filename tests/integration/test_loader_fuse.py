"""The FUSE server under a real kernel, with EROFS over its file. The server runs in this process,
so that the repository's request log can be seen."""

import errno
import os
from contextlib import contextmanager

import pytest

from imgsnap.fuse.files import DEVICE_FILE
from imgsnap.fuse.server import FuseServer
from imgsnap.fuse.session import negotiate
from imgsnap.mount import attach
from imgsnap.mount.linux import mount_points
from imgsnap.units import MIB
from tests.support.block_store import open_store
from tests.support.catalog import StaticCatalog
from tests.support.memory_repository import MemoryRepository
from tests.support.readers import compare_in_parallel, listing, run_all
from tests.support.snapshots import build_snapshot, erofs_image, make_tree

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    device = erofs_image(tree, tmp_path_factory.mktemp("image") / "x.erofs")
    return build_snapshot(device, extents=3, metadata_blocks=2)


@contextmanager
def served(repository, tmp_path, *, erofs=True, readahead_max=0):
    """The store, the served file, and the mounted tree."""
    device, target = tmp_path / "dev", tmp_path / "tree"
    device.mkdir(exist_ok=True)
    target.mkdir(exist_ok=True)
    with open_store(repository, tmp_path / "cache", readahead_max=readahead_max) as store:
        fd = attach.mount_fuse(device)
        catalog = StaticCatalog({"one": store.reader})
        server = FuseServer(fd, catalog, negotiate(fd))
        file = device / "one" / DEVICE_FILE
        try:
            server.start()
            attach.tune_readahead(device, attach.READ_AHEAD_LAZY_KB)
            if erofs:
                assert attach.mount_erofs(file, target).loop == ""
            yield store, file, target
        finally:
            attach.unmount(target, lazy=True)
            attach.unmount(device, lazy=True)
            assert server.join(10)
            os.close(fd)


def test_the_file_has_the_devices_bytes(built, tmp_path):
    repository = MemoryRepository(built)
    with served(repository, tmp_path, erofs=False) as (store, file, _):
        assert os.listdir(file.parent) == [DEVICE_FILE]
        assert file.stat().st_size == len(built.device)
        assert file.read_bytes() == built.device
        # Requests as long as the readahead: page by page there would be a thousand.
        assert store.statistics.hits + store.statistics.misses < len(built.device) / MIB * 10
        with pytest.raises(OSError):
            file.open("wb")


def test_random_readers_of_the_file(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.latency_ms = 3
    size = len(built.device)
    with served(repository, tmp_path, erofs=False, readahead_max=MIB) as (_, file, _):

        def reader(rng):
            fd = os.open(file, os.O_RDONLY)
            try:
                for _ in range(50):
                    offset = rng.randrange(size)
                    length = rng.choice((1, 4096, 100_000, 300_000))
                    assert os.pread(fd, length, offset) == built.device[offset : offset + length]
            finally:
                os.close(fd)

        run_all([reader] * 10, seed=3)


@pytest.mark.parametrize("readahead_max", [0, 8 * MIB])
def test_parallel_readers_of_the_tree(built, tree, tmp_path, readahead_max):
    repository = MemoryRepository(built)
    repository.faults.latency_ms = 2
    with served(repository, tmp_path, readahead_max=readahead_max) as (_, _, target):
        assert [p.fstype for p in mount_points() if p.target == target] == ["erofs"]
        assert listing(target) == listing(tree)
        compare_in_parallel(tree, target)
    transferred = sum(length for *_, length in repository.ranges)
    assert transferred < sum(len(repository.blobs[pack]) for pack in built.packs) * 1.1


def test_a_damaged_store_is_eio_and_the_log_names_it(built, tmp_path, caplog):
    repository = MemoryRepository(built)
    repository.faults.corrupt = 0
    with served(repository, tmp_path) as (_, _, target):
        repository.faults.corrupt = 1
        with pytest.raises(OSError) as caught:
            (target / "usr/lib/big.bin").read_bytes()
        assert caught.value.errno == errno.EIO
        assert "is damaged in the store" in caplog.text
        assert built.packs[0] in caplog.text or built.packs[1] in caplog.text
        repository.faults.corrupt = 0


def test_a_registry_that_goes_and_comes_back(built, tree, tmp_path, caplog):
    repository = MemoryRepository(built)
    with served(repository, tmp_path) as (_, _, target):
        first = (tree / "usr/lib/module001.py").read_bytes()
        assert (target / "usr/lib/module001.py").read_bytes() == first
        repository.faults.away = 1
        with pytest.raises(OSError) as caught:
            (target / "usr/lib/big.bin").read_bytes()
        assert caught.value.errno == errno.EIO
        assert "does not answer" in caplog.text
        assert (target / "usr/lib/module001.py").read_bytes() == first, "what is here is served"
        repository.faults.away = 0
        big = (tree / "usr/lib/big.bin").read_bytes()
        assert (target / "usr/lib/big.bin").read_bytes() == big


def test_a_registry_that_vanishes_under_load(built, tree, tmp_path):
    repository = MemoryRepository(built)
    with served(repository, tmp_path) as (_, _, target):
        repository.vanish_after = 4
        names = [path.name for path in (tree / "usr/lib").iterdir()]

        def reader(rng):
            rng.shuffle(names)
            for name in list(names):
                try:
                    data = (target / "usr/lib" / name).read_bytes()
                except OSError as error:
                    assert error.errno == errno.EIO
                else:
                    assert data == (tree / "usr/lib" / name).read_bytes()

        run_all([reader] * 4, seed=5)
        repository.vanish_after = None
        repository.faults.away = 0
        compare_in_parallel(tree, target, readers=4)
