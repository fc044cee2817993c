"""The chunk map: the chunks of one or more extents and where their frames are stored.

The pure part (chunk ids, block counts, block root) identifies an extent: `Extent.id`. The placement
part (pack, offset, length) belongs to one repository.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import cache

from imgsnap.digest import ChunkId, Digest, chunk_id
from imgsnap.units import BLOCK_SIZE

ZERO_PACK = 0xFFFF
"""Pack number of a chunk that is all zeros and is stored nowhere."""


@cache
def zero_chunk_id(blocks: int) -> ChunkId:
    """The id of a chunk of zeros."""
    return chunk_id(bytes(blocks * BLOCK_SIZE))


@dataclass(frozen=True, slots=True)
class PackRef:
    """A pack blob."""

    digest: Digest
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where one chunk's zstd frame is: bytes [offset, offset + length) of a pack."""

    pack: PackRef
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Extent:
    """The chunks of one layer's extent, in order, with their places.

    Columns have one row per chunk: `ids` 32 bytes each, `blocks` > 0, `pack` a row of
    ChunkMap.packs or ZERO_PACK, `offset` and `length` in bytes inside the pack.
    """

    diff_id: Digest
    total_blocks: int
    block_root: bytes  # of the extent's block tree, 32 bytes
    ids: bytes
    blocks: array[int]  # 'H'
    pack: array[int]  # 'H'
    offset: array[int]  # 'I'
    length: array[int]  # 'I'

    def __len__(self) -> int:
        return len(self.blocks)

    def chunk_id(self, row: int) -> ChunkId:
        return ChunkId(self.ids[row * 32 : row * 32 + 32])

    @property
    def id(self) -> str:
        """Hex BLAKE3-256 over the pure columns and the block root: equal ids mean equal bytes."""
        from blake3 import blake3

        hasher = blake3(b"imgsnap extent 2\0")
        hasher.update(len(self.blocks).to_bytes(4, "little"))
        hasher.update(self.ids)
        hasher.update(self.blocks.tobytes())
        hasher.update(self.block_root)
        return str(hasher.hexdigest())


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The extents of a snapshot in device order, or the one extent of a layer artefact."""

    packs: tuple[PackRef, ...]
    extents: tuple[Extent, ...]

    def place(self, extent: Extent, row: int) -> ChunkPlace | None:
        """Where the chunk is stored; None for a chunk of zeros."""
        number = extent.pack[row]
        if number == ZERO_PACK:
            return None
        return ChunkPlace(self.packs[number], extent.offset[row], extent.length[row])
