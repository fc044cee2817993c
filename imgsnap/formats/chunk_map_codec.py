"""Bytes of a chunk map (docs/format.md, "Chunk map") and back."""

from __future__ import annotations

import struct
import sys
from array import array
from dataclasses import dataclass
from typing import ClassVar

from imgsnap.digest import DIGEST_BYTES, digest_from_raw, digest_to_raw
from imgsnap.errors import FormatError
from imgsnap.formats.chunk_map import ZERO_PACK, ChunkMap, Extent, PackRef
from imgsnap.formats.features import check_features, check_version
from imgsnap.formats.rules import CHUNK_SIZE_LIMIT
from imgsnap.units import BLOCK_SIZE

RECORD = "chunk map"
MAGIC = b"IMGSNPCM"
VERSION = 2
HASH_BLAKE3 = 1

EXTENTS_MAX = 1024
"""Layers in one image and its hash tree; containerd and overlayfs stop at 500 layers."""
PACKS_MAX = 0xFFFF
"""Pack numbers are 16 bits and ZERO_PACK is not one."""
CHUNKS_MAX = 16 << 20
"""At 256 KiB a chunk this is 4 TiB of image."""
PACK_SIZE_MAX = 1 << 32
"""Offsets in a pack are 32 bits."""
FRAME_SIZE_MAX = CHUNK_SIZE_LIMIT + (CHUNK_SIZE_LIMIT >> 8) + 1024
"""ZSTD_compressBound of the largest chunk, rounded up."""
CHUNK_MAP_SIZE_MAX = 1 << 30
"""Upper bound of the decompressed blob: CHUNKS_MAX rows of 44 bytes and the tables."""

_LITTLE = sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Header:
    """offset size type name: 0 8 bytes magic · 8 2 u16 version · 10 1 u8 hash_algorithm ·
    11 1 u8 reserved · 12 4 u32 compat · 16 4 u32 ro_compat · 20 4 u32 incompat ·
    24 4 u32 extent_count · 28 4 u32 pack_count · 32 4 u32 chunk_count · 36 28 reserved"""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sHBBIIIIII28x")
    SIZE: ClassVar[int] = 64

    version: int
    hash_algorithm: int
    incompat: int
    extent_count: int
    pack_count: int
    chunk_count: int

    def pack(self) -> bytes:
        return self.STRUCT.pack(
            MAGIC,
            self.version,
            self.hash_algorithm,
            0,
            0,
            0,
            self.incompat,
            self.extent_count,
            self.pack_count,
            self.chunk_count,
        )

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Header:
        if len(data) < cls.SIZE:
            raise FormatError(RECORD, "header", 0, f"{len(data)} bytes, {cls.SIZE} needed")
        magic, version, algorithm, _, _, _, incompat, extents, packs, chunks = (
            cls.STRUCT.unpack_from(data)
        )
        if magic != MAGIC:
            raise FormatError(RECORD, "magic", 0, f"{magic!r} is not {MAGIC!r}")
        check_version(RECORD, version, VERSION)
        check_features(RECORD, incompat)
        if algorithm != HASH_BLAKE3:
            raise FormatError(RECORD, "hash_algorithm", 10, f"{algorithm} is unknown")
        for field, offset, value, maximum in (
            ("extent_count", 24, extents, EXTENTS_MAX),
            ("pack_count", 28, packs, PACKS_MAX),
            ("chunk_count", 32, chunks, CHUNKS_MAX),
        ):
            if value > maximum:
                raise FormatError(RECORD, field, offset, f"{value} is over {maximum}")
        return cls(version, algorithm, incompat, extents, packs, chunks)


assert Header.STRUCT.size == Header.SIZE

_EXTENT = struct.Struct("<32sII32s8x")
"""0 32 diff_id · 32 4 u32 total_blocks · 36 4 u32 chunk_count · 40 32 block_root ·
72 8 reserved"""
assert _EXTENT.size == 80

_PACK = struct.Struct("<32sQ")
"""0 32 sha256 · 32 8 u64 size"""
assert _PACK.size == 40

_COLUMNS = (("blocks", "H"), ("pack", "H"), ("offset", "I"), ("length", "I"))
"""After the ids column (32 bytes a row); each column holds all chunks of all extents."""


def _column_bytes(column: array[int]) -> bytes:
    if _LITTLE:
        return column.tobytes()
    swapped = array(column.typecode, column)
    swapped.byteswap()
    return swapped.tobytes()


def encode(chunk_map: ChunkMap) -> bytes:
    """The record's bytes; a pure function of the value."""
    extents = chunk_map.extents
    header = Header(
        VERSION, HASH_BLAKE3, 0, len(extents), len(chunk_map.packs), sum(map(len, extents))
    )
    parts = [header.pack()]
    parts += [
        _EXTENT.pack(digest_to_raw(e.diff_id), e.total_blocks, len(e), e.block_root)
        for e in extents
    ]
    parts += [_PACK.pack(digest_to_raw(p.digest), p.size) for p in chunk_map.packs]
    parts += [e.ids for e in extents]
    for name, _ in _COLUMNS:
        parts += [_column_bytes(getattr(e, name)) for e in extents]
    return b"".join(parts)


def decode(data: bytes) -> ChunkMap:
    """The value of a record. Raises FormatError or UnsupportedFormat."""
    header = Header.parse(data)
    expected = (
        Header.SIZE
        + header.extent_count * _EXTENT.size
        + header.pack_count * _PACK.size
        + header.chunk_count * (DIGEST_BYTES + sum(array(t).itemsize for _, t in _COLUMNS))
    )
    if len(data) != expected:
        raise FormatError(RECORD, "length", len(data), f"its header asks for {expected} bytes")
    packs = _decode_packs(data, header)
    extents = _decode_extents(data, header)
    for extent in extents:
        _check_extent(extent, packs)
    return ChunkMap(packs, extents)


def _decode_packs(data: bytes, header: Header) -> tuple[PackRef, ...]:
    start = Header.SIZE + header.extent_count * _EXTENT.size
    packs = []
    for number in range(header.pack_count):
        offset = start + number * _PACK.size
        raw, size = _PACK.unpack_from(data, offset)
        if not 0 < size <= PACK_SIZE_MAX:
            raise FormatError(RECORD, f"packs[{number}].size", offset + 32, f"{size}")
        packs.append(PackRef(digest_from_raw(raw), size))
    return tuple(packs)


def _decode_extents(data: bytes, header: Header) -> tuple[Extent, ...]:
    rows = [
        _EXTENT.unpack_from(data, Header.SIZE + number * _EXTENT.size)
        for number in range(header.extent_count)
    ]
    if sum(count for _, _, count, _ in rows) != header.chunk_count:
        raise FormatError(RECORD, "chunk_count", 32, "is not the sum of the extents' chunks")
    position = Header.SIZE + len(rows) * _EXTENT.size + header.pack_count * _PACK.size
    ids = memoryview(data)[position : position + header.chunk_count * DIGEST_BYTES]
    position += len(ids)
    columns: dict[str, array[int]] = {}
    for name, typecode in _COLUMNS:
        column = array(typecode)
        end = position + header.chunk_count * column.itemsize
        column.frombytes(memoryview(data)[position:end])
        if not _LITTLE:
            column.byteswap()
        columns[name] = column
        position = end
    extents = []
    first = 0
    for raw, total_blocks, count, root in rows:
        last = first + count
        cut = {name: column[first:last] for name, column in columns.items()}
        own_ids = bytes(ids[first * DIGEST_BYTES : last * DIGEST_BYTES])
        extents.append(Extent(digest_from_raw(raw), total_blocks, root, own_ids, **cut))
        first = last
    return tuple(extents)


def _check_extent(extent: Extent, packs: tuple[PackRef, ...]) -> None:
    """Chunks cover the extent exactly, and each frame lies inside its pack."""
    where = f"extent {extent.diff_id}"
    if sum(extent.blocks) != extent.total_blocks:
        raise FormatError(RECORD, where, 0, "its chunks do not cover its blocks")
    blocks_max = CHUNK_SIZE_LIMIT // BLOCK_SIZE
    for row, (blocks, pack, offset, length) in enumerate(
        zip(extent.blocks, extent.pack, extent.offset, extent.length, strict=True)
    ):
        if not 0 < blocks <= blocks_max:
            raise FormatError(RECORD, f"{where}.blocks[{row}]", 0, f"{blocks}")
        if pack == ZERO_PACK:
            if offset or length:
                raise FormatError(RECORD, f"{where}.pack[{row}]", 0, "a zero chunk with a place")
        elif pack >= len(packs):
            raise FormatError(RECORD, f"{where}.pack[{row}]", 0, f"no pack {pack}")
        elif not 0 < length <= FRAME_SIZE_MAX or offset + length > packs[pack].size:
            raise FormatError(RECORD, f"{where}.offset[{row}]", 0, "frame outside its pack")
