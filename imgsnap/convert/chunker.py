"""Chunk rule 1: where an extent is cut (normative text in docs/format.md, "Chunk rule").

Content-defined at file granularity: a cut depends on the files before it only through the group
it closes, so that an added or changed file moves few chunks. Integers only; no rounding of a
libm may ever move a cut.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from imgsnap.formats.layer_index import FileColumns
from imgsnap.formats.rules import Rules
from imgsnap.units import BLOCK_SIZE, blocks_for

_FIXED_BITS = 128


class Piece(NamedTuple):
    """A run of one file, padded with zeros to whole blocks in the chunk."""

    file: int  # row in FileColumns
    offset: int
    length: int


class PlannedChunk(NamedTuple):
    """Consecutive pieces that fill `blocks` blocks of the extent."""

    blocks: int
    pieces: tuple[Piece, ...]


@cache
def cut_threshold(file_blocks: int, target_blocks: int) -> int:
    """floor((1 - e^(-file_blocks / target_blocks)) * 2^64), by integer arithmetic alone.

    A digest whose first 8 bytes (little-endian) are below it cuts after its file.
    """
    one = 1 << _FIXED_BITS
    x = (file_blocks << _FIXED_BITS) // target_blocks
    total = term = one
    n = 1
    while term:
        term = term * x // (n << _FIXED_BITS)
        total += term  # the series of e^x has no cancellation
        n += 1
    return (one - (one << _FIXED_BITS) // total) >> (_FIXED_BITS - 64)


def plan(files: FileColumns, rules: Rules) -> Iterator[PlannedChunk]:
    """The chunks of an extent, in order; they cover it exactly."""
    target, low, high = rules.chunk_target, rules.chunk_min, rules.chunk_max
    target_blocks = target // BLOCK_SIZE
    group: list[Piece] = []
    grouped = 0  # bytes in the group, padded
    for row, size in enumerate(files.size):
        if size >= target:
            if group:
                yield PlannedChunk(grouped // BLOCK_SIZE, tuple(group))
                group, grouped = [], 0
            for offset, length in pieces(size, rules):
                yield PlannedChunk(blocks_for(length), (Piece(row, offset, length),))
            continue
        padded = blocks_for(size) * BLOCK_SIZE
        if group and grouped + padded > high:
            yield PlannedChunk(grouped // BLOCK_SIZE, tuple(group))
            group, grouped = [], 0
        group.append(Piece(row, 0, size))
        grouped += padded
        if grouped >= low:
            mark = int.from_bytes(files.digest[row * 32 : row * 32 + 8], "little")
            if mark < cut_threshold(padded // BLOCK_SIZE, target_blocks):
                yield PlannedChunk(grouped // BLOCK_SIZE, tuple(group))
                group, grouped = [], 0
    if group:
        yield PlannedChunk(grouped // BLOCK_SIZE, tuple(group))


def pieces(size: int, rules: Rules) -> Iterator[tuple[int, int]]:
    """Offset and length of a large file's chunks: pieces of the target's size from its start, of
    which the last one is shorter than target + min."""
    offset = 0
    while offset < size:
        rest = size - offset
        length = rules.chunk_target if rest >= rules.chunk_target + rules.chunk_min else rest
        yield offset, length
        offset += length
