"""Blocks to paths: against the bytes of an image that mkfs.erofs made."""

import os
import random

import pytest

from imgsnap.blockstore.block_paths import PATHS_MAX, MetadataBlocks, block_paths
from imgsnap.errors import ImgsnapError
from imgsnap.formats.erofs_read import ErofsReader
from tests.support.snapshots import erofs_image

BLOCK = 4096


class Device:
    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = data

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


@pytest.fixture
def tree(tmp_path):
    rng = random.Random(3)
    root = tmp_path / "tree"
    (root / "usr/lib").mkdir(parents=True)
    (root / "etc").mkdir()
    for number, size in enumerate((40, 4095, 4096, 4097, 50_000, 300_000)):
        (root / f"usr/lib/f{number}").write_bytes(rng.randbytes(size))
    (root / "etc/empty").touch()
    os.symlink("../usr/lib/f5", root / "etc/link")
    os.link(root / "usr/lib/f4", root / "etc/hard")
    (root / os.fsdecode(b"etc/\xff<b>")).write_bytes(rng.randbytes(9000))
    return root


def test_every_block_of_every_file_is_found_by_its_bytes(tree, tmp_path):
    device = erofs_image(tree, tmp_path / "image")
    reader = ErofsReader(Device(device))
    expected: dict[int, set[bytes]] = {}
    for directory, _, names in os.walk(os.fsencode(tree)):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.islink(path) or not os.path.getsize(path):
                continue
            with open(path, "rb") as file:
                content = file.read()
            at = device.find(content)
            assert at % BLOCK == 0 and device.count(content[:40]) == 1
            for block in range(at // BLOCK, -(-(at + len(content)) // BLOCK)):
                expected.setdefault(block, set()).add(os.path.relpath(path, os.fsencode(tree)))
    blocks = range(len(device) // BLOCK)
    found = block_paths(reader, [(block, block + 1) for block in blocks])
    # Directories have data in blocks too; what is asked here is who the files are.
    files = {path for paths in expected.values() for path in paths}
    for block in blocks:
        named = set(found[block, block + 1].paths) & files
        assert named == expected.get(block, set()), block
    assert any(paths == {b"etc/hard", b"usr/lib/f4"} for paths in expected.values())
    whole = found_one(reader, (0, len(device) // BLOCK))
    assert len(whole.paths) == PATHS_MAX and whole.more


def found_one(reader: ErofsReader, run: tuple[int, int]):
    return block_paths(reader, [run])[run]


def test_runs_may_overlap_repeat_and_lie_anywhere(tree, tmp_path):
    device = erofs_image(tree, tmp_path / "image")
    reader = ErofsReader(Device(device))
    at = device.find((tree / "usr/lib/f5").read_bytes()) // BLOCK
    runs = [(at, at + 1), (at, at + 1), (at, at + 20), (at + 70, at + 73), (10**9, 10**9 + 5)]
    found = block_paths(reader, runs)
    assert len(found) == 4
    for run in runs[:4]:
        assert b"usr/lib/f5" in found[run].paths
    assert found[runs[4]].paths == [] and not found[runs[4]].more
    assert block_paths(reader, []) == {}


def test_metadata_alone_says_what_it_is_not(tmp_path):
    path = tmp_path / "region"
    path.write_bytes(bytes(BLOCK))
    with path.open("rb") as file:
        device = MetadataBlocks(file, BLOCK, 10 * BLOCK)
        assert device.size == 10 * BLOCK and device.read(10, 20) == bytes(20)
        with pytest.raises(ImgsnapError, match="not metadata"):
            device.read(BLOCK - 1, 2)
