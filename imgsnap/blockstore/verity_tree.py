"""Building the verity area of a device as a file, and checking one (formats/verity.py).

Nothing of the tree is held in memory: hashes of blocks may come in any order and are written where
they belong, and each level is made by reading the one below it.
"""

import os
from pathlib import Path
from typing import Self

from imgsnap.errors import DigestMismatch, IntegrityError, ResourceExhausted
from imgsnap.formats.snapshot_config import SnapshotConfig, VerityConfig
from imgsnap.formats.verity import (
    HASH_BYTES,
    HASHES_PER_BLOCK,
    Level,
    VerityLayout,
    block_hash,
    block_hashes,
    superblock,
)
from imgsnap.units import BLOCK_SIZE, MIB

_COPY = MIB


class TreeFile:
    """The verity area of a device with `data_blocks` blocks, being made in a file of its own.

    Use as a context manager: leaving closes the file. Methods raise OSError.
    """

    def __init__(self, path: Path, data_blocks: int) -> None:
        self.layout = VerityLayout(data_blocks)
        self._levels = self.layout.levels
        # A tree without levels has its one hash in a block that `finish` cuts off again.
        self._leaves = (self._levels[0].first if self._levels else 1) * BLOCK_SIZE
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def put_data(self, block: int, data: bytes) -> None:
        """Takes whole blocks of the device, the first of which is `block`."""
        self.put_hashes(block, b"".join(block_hashes(data)))

    def put_hashes(self, block: int, hashes: bytes) -> None:
        """Takes the hashes of blocks, 32 bytes each."""
        _write(self._fd, hashes, self._leaves + block * HASH_BYTES)

    def finish(self, uuid: bytes) -> str:
        """Makes the levels and the superblock, when all hashes are there; the root hash in hex."""
        os.ftruncate(self._fd, max(self.layout.blocks * BLOCK_SIZE, self._leaves + HASH_BYTES))
        root = b""
        for number, level in enumerate(self._levels):
            above = self._levels[number + 1] if number + 1 < len(self._levels) else None
            root = self._hash_level(level, above)
        if not self._levels:
            root = read_exactly(self._fd, self._leaves, HASH_BYTES)
            os.ftruncate(self._fd, BLOCK_SIZE)
        _write(self._fd, superblock(self.layout.data_blocks, uuid), 0)
        return root.hex()

    def _hash_level(self, level: Level, above: Level | None) -> bytes:
        """Writes the level above; returns the last hash, which is the root's without one."""
        last = b""
        for at in range(0, level.blocks * BLOCK_SIZE, _COPY):
            length = min(_COPY, level.blocks * BLOCK_SIZE - at)
            data = read_exactly(self._fd, level.first * BLOCK_SIZE + at, length)
            hashes = b"".join(block_hashes(data))
            last = hashes[-HASH_BYTES:]
            if above is not None:
                place = above.first * BLOCK_SIZE + at // BLOCK_SIZE * HASH_BYTES
                _write(self._fd, hashes, place)
        return last


def root_hash_of(device: int, data_blocks: int, uuid: bytes, area: Path) -> str:
    """The root hash over the first `data_blocks` blocks of a descriptor; the area is left in
    `area`. Raises OSError, IntegrityError for a device that is too short."""
    with TreeFile(area, data_blocks) as tree:
        for at in range(0, data_blocks * BLOCK_SIZE, _COPY):
            length = min(_COPY, data_blocks * BLOCK_SIZE - at)
            tree.put_data(at // BLOCK_SIZE, read_exactly(device, at, length))
        return tree.finish(uuid)


def check_tree(config: SnapshotConfig, device: Path, area: Path) -> str | None:
    """Computes a snapshot's root hash and tree anew from its device, a local file with every byte,
    and compares them; `area` is a file for the tree. Returns the root hash; None of a snapshot
    that has none.

    Raises DigestMismatch when the root hash is another, IntegrityError when it is right and the
    tree on the device is not, ResourceExhausted when there is no room for the tree.
    """
    if config.verity is None:
        return None
    try:
        return _check_tree(config, config.verity, device, area)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {area}: {error.strerror}") from error


def _check_tree(config: SnapshotConfig, stated: VerityConfig, device: Path, area: Path) -> str:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        root_hash = root_hash_of(fd, config.total_blocks, bytes.fromhex(config.uuid), area)
        if root_hash != stated.root_hash:
            raise DigestMismatch("dm-verity root hash", stated.root_hash, root_hash)
        with area.open("rb") as file:
            for at in range(0, stated.extent.blocks * BLOCK_SIZE, _COPY):
                wanted = file.read(_COPY)
                place = stated.extent.base_block * BLOCK_SIZE + at
                if read_exactly(fd, place, len(wanted)) != wanted:
                    raise IntegrityError(
                        f"the dm-verity area at {place} is not that of the root hash",
                        hint="guests that verify the device would refuse blocks: convert it again",
                    )
    finally:
        os.close(fd)
    return root_hash


class VerifiedDevice:
    """Reads of a device with a tree on it, each block verified against a root hash.

    What the guest's kernel does, for what the host reads on its behalf. Blocks of the tree are
    verified each time: nothing is kept. Raises IntegrityError where the device is not what the
    root hash says.
    """

    def __init__(self, fd: int, data_blocks: int, root_hash: str) -> None:
        self._fd = fd
        self._data_blocks = data_blocks
        self._levels = VerityLayout(data_blocks).levels
        self._root = bytes.fromhex(root_hash)
        self.size = data_blocks * BLOCK_SIZE

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the data; fewer than `length` at its end."""
        end = min(offset + length, self.size)
        if end <= offset:
            return b""
        first = offset // BLOCK_SIZE
        blocks = (self._block(block) for block in range(first, -(-end // BLOCK_SIZE)))
        start = offset - first * BLOCK_SIZE
        return b"".join(blocks)[start : start + end - offset]

    def _block(self, block: int) -> bytes:
        wanted = self._root
        for number in reversed(range(len(self._levels))):
            index = block // HASHES_PER_BLOCK**number
            place = self._data_blocks + self._levels[number].first + index // HASHES_PER_BLOCK
            node = self._verified(place, wanted)
            at = index % HASHES_PER_BLOCK * HASH_BYTES
            wanted = node[at : at + HASH_BYTES]
        return self._verified(block, wanted)

    def _verified(self, block: int, wanted: bytes) -> bytes:
        data = read_exactly(self._fd, block * BLOCK_SIZE, BLOCK_SIZE)
        if block_hash(data) != wanted:
            raise IntegrityError(
                f"block {block} of the device is not what the root hash says",
                hint="whoever serves the snapshot changed it, or it is damaged",
            )
        return data


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Raises IntegrityError at the end of the file, OSError."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            raise IntegrityError(f"a file ends at {offset + len(data)}, before {offset + length}")
        data += more
    return data


def _write(fd: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
