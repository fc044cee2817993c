"""The verity area of a device: a dm-verity superblock and hash tree behind the data they cover.

The kernel's format 1 (Documentation/admin-guide/device-mapper/verity.rst) with sha256, blocks of
4096 bytes for data and hashes, and no salt, so that the hash of a block does not depend on its
image. The superblock is cryptsetup's (lib/verity/verity.c, struct verity_sb); the kernel does not
read it. As veritysetup lays it out: superblock, then the levels from the top one to the leaves. A
block of a level has the hashes of 128 blocks below it, filled up with zeros. The root hash is that
of the top level's one block; of a single data block, which needs no level, the hash of that block.
"""

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.units import BLOCK_SIZE

ALGORITHM = "sha256"
HASH_BYTES = 32
HASHES_PER_BLOCK = BLOCK_SIZE // HASH_BYTES
SECTORS_PER_BLOCK = BLOCK_SIZE // 512
"""dm counts in sectors of 512 bytes."""
_MAGIC = b"verity\0\0"
_VERSION = 1
_HASH_TYPE = 1
"""1: the salt, if any, is hashed before the block; 0 was Chrome OS's own."""


class VeritySuperblock(NamedTuple):
    """struct verity_sb, 512 bytes at the start of the area's first block.

    ======  ====  =====  ===============  ================================================
    offset  size  type   name             meaning
    ======  ====  =====  ===============  ================================================
    0       8     bytes  magic            ``verity`` and two NULs
    8       4     u32    version          1
    12      4     u32    hash_type        1
    16      16    bytes  uuid             that of the EROFS file system
    32      32    bytes  algorithm        ``sha256``, filled up with NULs
    64      4     u32    data_block_size  4096
    68      4     u32    hash_block_size  4096
    72      8     u64    data_blocks      blocks before the area
    80      2     u16    salt_size        0
    82      6            (reserved)       0
    88      256   bytes  salt             0
    344     168          (reserved)       0
    ======  ====  =====  ===============  ================================================
    """

    magic: bytes
    version: int
    hash_type: int
    uuid: bytes
    algorithm: bytes
    data_block_size: int
    hash_block_size: int
    data_blocks: int
    salt_size: int
    salt: bytes


VERITY_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s168x")
assert VERITY_SUPERBLOCK.size == 512


def superblock(data_blocks: int, uuid: bytes) -> bytes:
    """The area's first block."""
    fields = VeritySuperblock(
        magic=_MAGIC,
        version=_VERSION,
        hash_type=_HASH_TYPE,
        uuid=uuid,
        algorithm=ALGORITHM.encode(),
        data_block_size=BLOCK_SIZE,
        hash_block_size=BLOCK_SIZE,
        data_blocks=data_blocks,
        salt_size=0,
        salt=b"",
    )
    return VERITY_SUPERBLOCK.pack(*fields).ljust(BLOCK_SIZE, b"\0")


class Level(NamedTuple):
    """One level of a tree: where it starts in the area, and its hashes and blocks."""

    first: int  # block of the area
    hashes: int
    blocks: int


@dataclass(frozen=True, slots=True)
class VerityLayout:
    """Where everything is in the area of a device with `data_blocks` > 0 blocks of data."""

    data_blocks: int

    @property
    def levels(self) -> tuple[Level, ...]:
        """From the leaves up; none for a single block."""
        counts: list[tuple[int, int]] = []
        hashes = self.data_blocks
        while hashes > 1:
            blocks = -(-hashes // HASHES_PER_BLOCK)
            counts.append((hashes, blocks))
            hashes = blocks
        first = 1
        found: list[Level] = []
        for hashes, blocks in reversed(counts):
            found.append(Level(first, hashes, blocks))
            first += blocks
        return tuple(reversed(found))

    @property
    def blocks(self) -> int:
        """Of the whole area."""
        return 1 + sum(level.blocks for level in self.levels)

    def table(self, device: str, root_hash: str) -> str:
        """A device-mapper table for the data, all of it on `device` (verity.rst, "Construction
        Parameters"): a block that is not what the root hash says is an I/O error."""
        sizes = f"{BLOCK_SIZE} {BLOCK_SIZE} {self.data_blocks} {self.data_blocks + 1}"
        sectors = self.data_blocks * SECTORS_PER_BLOCK
        return f"0 {sectors} verity 1 {device} {device} {sizes} {ALGORITHM} {root_hash} -"


def is_root_hash(text: str) -> bool:
    """Whether this is a root hash as it is written: 64 hex digits, lower case."""
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None


def block_hash(block: bytes | memoryview) -> bytes:
    """The hash of one whole block."""
    return hashlib.sha256(block).digest()


def block_hashes(data: bytes | memoryview) -> Iterator[bytes]:
    """The hash of each block of `data`, which is whole blocks."""
    view = memoryview(data)
    return (block_hash(view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))
