"""A regular file's bytes inside a layer tar: hashing and reading, with holes as zeros."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from blake3 import blake3

from imgsnap.convert.tar import Segment
from imgsnap.units import MIB

_ZEROS = bytes(MIB)
HASH_PIECE = 4 * MIB
"""Hashed at a time, so that a large file does not pull its pages into memory all at once."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """`size` bytes, of which `segments` are stored in the tar and the rest are zeros."""

    size: int
    segments: tuple[Segment, ...]


def _parts(content: FileContent, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(offset in the tar or -1 for zeros, length) that make up [offset, offset + length)."""
    position, end = offset, offset + length
    for start, place, size in content.segments:
        if start + size <= position:
            continue
        if start >= end:
            break
        if start > position:
            yield -1, start - position
            position = start
        taken = min(start + size, end) - position
        yield place + position - start, taken
        position += taken
    if position < end:
        yield -1, end - position


def digest(content: FileContent, tar: memoryview) -> bytes:
    """BLAKE3-256 of the content."""
    if len(content.segments) == 1 and content.segments[0][2] == content.size <= HASH_PIECE:
        place = content.segments[0][1]
        return blake3(tar[place : place + content.size]).digest()
    hasher = blake3()
    for place, length in _parts(content, 0, content.size):
        for start in range(0, length, HASH_PIECE):
            piece = min(HASH_PIECE, length - start)
            if place >= 0:
                hasher.update(tar[place + start : place + start + piece])
                continue
            for _ in range(piece // MIB):
                hasher.update(_ZEROS)
            hasher.update(_ZEROS[: piece % MIB])
    return hasher.digest()


def read(content: FileContent, fd: int, offset: int, length: int) -> list[bytes]:
    """Bytes [offset, offset + length) of the content, from the tar open as `fd`."""
    pieces = []
    for place, size in _parts(content, offset, length):
        piece = bytes(size) if place < 0 else os.pread(fd, size, place)
        if len(piece) != size:
            raise OSError(f"the spooled layer is cut off at {place}")
        pieces.append(piece)
    return pieces
