"""Hash trees: against a simple model, from hashes in any order, and reads verified by them."""

import hashlib
import itertools
import os
import random
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgsnap.blockstore.materialise import materialise
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import open_snapshot
from imgsnap.blockstore.verity_tree import TreeFile, VerifiedDevice, check_tree
from imgsnap.errors import DigestMismatch, IntegrityError
from imgsnap.formats.verity import VerityLayout
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device
from tests.support.verity import BLOCK, naive_area, naive_tree

UUID = bytes(range(16))


def hashes(count: int, seed: int = 1) -> list[bytes]:
    raw = random.Random(seed).randbytes(32 * count)
    return [raw[n : n + 32] for n in range(0, len(raw), 32)]


@pytest.mark.parametrize("blocks", [1, 2, 127, 128, 129, 16384, 16385, 70_000])
def test_the_tree_is_that_of_the_model(blocks: int, tmp_path) -> None:
    given_ = hashes(blocks)
    area, root = naive_area(given_, UUID)
    path = tmp_path / "area"
    with TreeFile(path, blocks) as tree:
        tree.put_hashes(0, b"".join(given_))
        assert tree.finish(UUID) == root
    assert path.read_bytes() == area
    assert len(area) == VerityLayout(blocks).blocks * BLOCK


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.integers(0))
def test_blocks_come_in_any_order(tmp_path_factory, blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    device = rng.randbytes(blocks * BLOCK)
    area, root = naive_tree(device, UUID)
    cuts = sorted({0, blocks, *(rng.randrange(blocks) for _ in range(5))})
    runs = list(itertools.pairwise(cuts))
    rng.shuffle(runs)
    directory = tmp_path_factory.mktemp("tree")
    sums = [hashlib.sha256(device[n * BLOCK :][:BLOCK]).digest() for n in range(blocks)]
    with TreeFile(directory / "area", blocks) as tree:
        for first, last in runs:
            if rng.random() < 0.5:
                tree.put_data(first, device[first * BLOCK : last * BLOCK])
            else:
                tree.put_hashes(first, b"".join(sums[first:last]))
        assert tree.finish(UUID) == root
    assert (directory / "area").read_bytes() == area


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 128, 129, 300]),
    st.integers(0),
    st.integers(0, 7),
    st.lists(st.tuples(st.integers(0, 400 * BLOCK), st.integers(0, 3 * BLOCK)), max_size=4),
)
def test_a_flipped_bit_is_never_read(
    tmp_path_factory, blocks: int, where: int, bit: int, reads: list[tuple[int, int]]
) -> None:
    data = random_device(blocks)
    area, root = naive_tree(data, UUID)
    flipped = bytearray(data + area)
    where %= len(flipped)
    flipped[where] ^= 1 << bit
    path = tmp_path_factory.mktemp("device") / "device"
    for content, damaged in ((data + area, False), (bytes(flipped), True)):
        path.write_bytes(content)
        fd = os.open(path, os.O_RDONLY)
        try:
            device = VerifiedDevice(fd, blocks, root)
            for offset, length in [*reads, (0, len(data))]:
                try:
                    assert device.read(offset, length) == data[offset : offset + length]
                except IntegrityError:
                    assert damaged
            # The superblock is not read, and zeros behind a level's last hash are hashed too.
            if damaged and not len(data) <= where < len(data) + BLOCK:
                with pytest.raises(IntegrityError):
                    device.read(0, len(data))
        finally:
            os.close(fd)


def test_a_short_device_is_an_error(tmp_path) -> None:
    path = tmp_path / "device"
    path.write_bytes(bytes(5000))
    with path.open("rb") as file, pytest.raises(IntegrityError):
        VerifiedDevice(file.fileno(), 2, "00" * 32).read(0, 8192)


# Snapshots ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed():
    return build_snapshot(random_device(300), metadata_blocks=3, extents=2, verity=True)


def test_the_tree_is_part_of_the_device(sealed, tmp_path) -> None:
    with open_store(MemoryRepository(sealed), tmp_path / "cache") as store:
        assert store.reader.read(0, len(sealed.device)) == sealed.device
        assert len(sealed.device) > 300 * BLOCK
    with closing(open_snapshot(MemoryRepository(sealed), "latest", NodeCache(tmp_path))) as opened:
        device = tmp_path / "device"
        materialise(opened, device)
        assert device.read_bytes() == sealed.device
        assert opened.size == len(sealed.device)
        assert check_tree(opened.config, device, tmp_path / "area") == sealed.config.root_hash


def test_checking_finds_wrong_bytes_and_wrong_trees(sealed, tmp_path) -> None:
    path, area = tmp_path / "device", tmp_path / "area"
    for block, error in ((0, DigestMismatch), (299, DigestMismatch), (301, IntegrityError)):
        damaged = bytearray(sealed.device)
        damaged[block * BLOCK + 7] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(error, match="dm-verity"):
            check_tree(sealed.config, path, area)
    plain = build_snapshot(random_device(300))
    assert check_tree(plain.config, path, area) is None
