"""The boot pack: the blocks a start reads, in the order it reads them (docs/format/boot-pack.md).

Header, table (one zstd frame), then zstd frames of blocks. The table names the blocks of each
frame and carries, for each run of blocks, the nodes of its extent's block tree, and for each extent
the hashes that lead from those nodes to the extent's block root. A reader checks the table against
the roots it has, and then each frame against the table, while the frames arrive.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from imgsnap.errors import FormatError
from imgsnap.formats.block_tree import HASH_BYTES, cover
from imgsnap.formats.features import check_features, check_version
from imgsnap.formats.frame import compress, decompress_exact
from imgsnap.units import BLOCK_SIZE

RECORD = "boot pack"
MAGIC = b"IMGSNPBP"
VERSION = 1
HASH_BLAKE3 = 1

EXTENTS_MAX = 1024
BLOCKS_MAX = 1 << 18
"""1 GiB of blocks; a start that reads more wants the whole image."""
FRAMES_MAX = 1 << 16
FRAME_BLOCKS_MAX = 1 << 10
"""What a reader holds of a frame at a time: 4 MiB."""
PROOF_MAX = 1 << 19
TABLE_SIZE_MAX = 32 << 20
"""BLOCKS_MAX runs of one block each, and as many hashes of a proof."""
TABLE_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Header:
    """offset size type name: 0 8 bytes magic · 8 2 u16 version · 10 1 u8 hash_algorithm ·
    11 1 u8 reserved · 12 4 u32 compat · 16 4 u32 ro_compat · 20 4 u32 incompat ·
    24 4 u32 extent_count · 28 4 u32 frame_count · 32 4 u32 run_count · 36 4 u32 node_count ·
    40 4 u32 proof_count · 44 4 u32 table_length · 48 16 reserved"""

    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sHBBIIIIIIIII16x")
    SIZE: ClassVar[int] = 64

    extent_count: int
    frame_count: int
    run_count: int
    node_count: int
    proof_count: int
    table_length: int  # of the compressed table, which follows

    @property
    def table_size(self) -> int:
        """Of the decompressed table."""
        return (
            self.extent_count * _EXTENT.size
            + self.frame_count * _FRAME.size
            + self.run_count * _RUN.size
            + (self.node_count + self.proof_count) * HASH_BYTES
        )

    def pack(self) -> bytes:
        return self.STRUCT.pack(
            MAGIC,
            VERSION,
            HASH_BLAKE3,
            0,
            0,
            0,
            0,
            self.extent_count,
            self.frame_count,
            self.run_count,
            self.node_count,
            self.proof_count,
            self.table_length,
        )

    @classmethod
    def parse(cls, data: bytes | memoryview) -> Header:
        """Raises FormatError or UnsupportedFormat."""
        if len(data) < cls.SIZE:
            raise FormatError(RECORD, "header", 0, f"{len(data)} bytes, {cls.SIZE} needed")
        magic, version, algorithm, _, _, _, incompat, *counts = cls.STRUCT.unpack_from(data)
        if magic != MAGIC:
            raise FormatError(RECORD, "magic", 0, f"{magic!r} is not {MAGIC!r}")
        check_version(RECORD, version, VERSION)
        check_features(RECORD, incompat)
        if algorithm != HASH_BLAKE3:
            raise FormatError(RECORD, "hash_algorithm", 10, f"{algorithm} is unknown")
        header = cls(*counts)
        for field, offset, value, maximum in (
            ("extent_count", 24, header.extent_count, EXTENTS_MAX),
            ("frame_count", 28, header.frame_count, FRAMES_MAX),
            ("run_count", 32, header.run_count, BLOCKS_MAX),
            ("node_count", 36, header.node_count, BLOCKS_MAX),
            ("proof_count", 40, header.proof_count, PROOF_MAX),
            ("table_length", 44, header.table_length, TABLE_SIZE_MAX),
        ):
            if value > maximum:
                raise FormatError(RECORD, field, offset, f"{value} is over {maximum}")
        return header


assert Header.STRUCT.size == Header.SIZE

_EXTENT = struct.Struct("<32sII")
"""0 32 extent id · 32 4 u32 total_blocks · 36 4 u32 proof_count"""
assert _EXTENT.size == 40

_FRAME = struct.Struct("<II")
"""0 4 u32 length · 4 4 u32 run_count"""
assert _FRAME.size == 8

_RUN = struct.Struct("<IHH")
"""0 4 u32 block · 4 2 u16 count · 6 2 u16 extent"""
assert _RUN.size == 8


class Run(NamedTuple):
    """Blocks [first, first + blocks) of an extent, by its number in the table."""

    extent: int
    first: int
    blocks: int


class BootExtent(NamedTuple):
    """An extent with blocks in the pack. `proof` leads from its nodes to its block root."""

    id: str
    blocks: int
    proof: tuple[bytes, ...]


class BootFrame(NamedTuple):
    """A zstd frame: the blocks of its runs, one after the other. `length` is compressed."""

    length: int
    runs: tuple[Run, ...]
    nodes: tuple[bytes, ...]  # `block_tree.cover` of each run in turn

    @property
    def blocks(self) -> int:
        return sum(run.blocks for run in self.runs)


@dataclass(frozen=True, slots=True)
class BootTable:
    """What a boot pack holds, in the order of its frames."""

    extents: tuple[BootExtent, ...]
    frames: tuple[BootFrame, ...]

    @property
    def blocks(self) -> int:
        return sum(frame.blocks for frame in self.frames)

    @property
    def frames_length(self) -> int:
        """Bytes of all frames, which are what follows the table."""
        return sum(frame.length for frame in self.frames)


def frame_length_max(blocks: int) -> int:
    """ZSTD_compressBound of that many blocks, rounded up."""
    size = blocks * BLOCK_SIZE
    return size + (size >> 8) + 1024


def encode(table: BootTable) -> bytes:
    """Header and table; the frames follow."""
    runs = [run for frame in table.frames for run in frame.runs]
    nodes = [node for frame in table.frames for node in frame.nodes]
    proofs = [digest for extent in table.extents for digest in extent.proof]
    content = b"".join(
        (
            *(_EXTENT.pack(bytes.fromhex(e.id), e.blocks, len(e.proof)) for e in table.extents),
            *(_FRAME.pack(frame.length, len(frame.runs)) for frame in table.frames),
            *(_RUN.pack(run.first, run.blocks, run.extent) for run in runs),
            *nodes,
            *proofs,
        )
    )
    raw = compress(content, TABLE_LEVEL)
    counts = (len(table.extents), len(table.frames), len(runs), len(nodes), len(proofs))
    return Header(*counts, len(raw)).pack() + raw


def decode_table(header: Header, raw: bytes) -> BootTable:
    """The table behind a header. Raises FormatError."""
    if header.table_size > TABLE_SIZE_MAX:
        raise FormatError(RECORD, "table", 24, f"{header.table_size} is over {TABLE_SIZE_MAX}")
    content = decompress_exact(raw, header.table_size, record=f"{RECORD} table")
    position = header.extent_count * _EXTENT.size
    extents = list(_EXTENT.iter_unpack(content[:position]))
    end = position + header.frame_count * _FRAME.size
    frames = list(_FRAME.iter_unpack(content[position:end]))
    position, end = end, end + header.run_count * _RUN.size
    runs = [Run(e, block, count) for block, count, e in _RUN.iter_unpack(content[position:end])]
    hashes = [content[at : at + HASH_BYTES] for at in range(end, header.table_size, HASH_BYTES)]
    nodes, proofs = hashes[: header.node_count], iter(hashes[header.node_count :])
    if sum(count for _, _, count in extents) != header.proof_count:
        raise FormatError(RECORD, "proof_count", 40, "is not the sum of the extents' proofs")
    table = BootTable(
        tuple(
            BootExtent(raw_id.hex(), blocks, tuple(next(proofs) for _ in range(count)))
            for raw_id, blocks, count in extents
        ),
        tuple(_frames(frames, runs, nodes)),
    )
    _check_runs(table)
    return table


def _frames(
    rows: Sequence[tuple[int, int]], runs: Sequence[Run], nodes: Sequence[bytes]
) -> Iterator[BootFrame]:
    run_at = node_at = 0
    for number, (length, count) in enumerate(rows):
        own = tuple(runs[run_at : run_at + count])
        blocks = sum(run.blocks for run in own)
        if len(own) != count or not 0 < blocks <= FRAME_BLOCKS_MAX:
            raise FormatError(RECORD, f"frames[{number}]", 0, f"{blocks} blocks in {count} runs")
        if not 0 < length <= frame_length_max(blocks):
            raise FormatError(RECORD, f"frames[{number}].length", 0, f"{length}")
        needed = sum(1 for run in own for _ in cover(run.first, run.blocks))
        run_at, node_at = run_at + count, node_at + needed
        yield BootFrame(length, own, tuple(nodes[node_at - needed : node_at]))
    if run_at != len(runs) or node_at != len(nodes):
        raise FormatError(RECORD, "frames", 28, "do not hold exactly the runs and the nodes")


def _check_runs(table: BootTable) -> None:
    """Runs lie inside their extents and apart from each other."""
    runs = sorted(run for frame in table.frames for run in frame.runs)
    if sum(run.blocks for run in runs) > BLOCKS_MAX:
        raise FormatError(RECORD, "runs", 32, f"over {BLOCKS_MAX} blocks")
    before = Run(-1, 0, 0)
    for run in runs:
        if run.extent >= len(table.extents) or not run.blocks:
            raise FormatError(RECORD, "runs", 32, f"{run} is of no extent or empty")
        if run.first + run.blocks > table.extents[run.extent].blocks:
            raise FormatError(RECORD, "runs", 32, f"{run} is outside of its extent")
        if run.extent == before.extent and run.first < before.first + before.blocks:
            raise FormatError(RECORD, "runs", 32, f"{run} overlaps {before}")
        before = run
    if len({extent.id for extent in table.extents}) != len(table.extents):
        raise FormatError(RECORD, "extents", 24, "name one twice")
