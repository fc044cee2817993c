"""Every chunk of a chunk map, from packs that are read once, as streams, and verified."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from imgsnap.digest import ChunkId, chunk_id
from imgsnap.errors import DigestMismatch, FormatError, IntegrityError
from imgsnap.formats import frame
from imgsnap.formats.chunk_map import ChunkMap, PackRef, zero_chunk_id
from imgsnap.oci import media_types
from imgsnap.oci.repository import ByteStream, Descriptor, Repository
from imgsnap.units import BLOCK_SIZE, MIB

Advance = Callable[[int], None]
Sink = Callable[[bytes, Sequence[int]], None]
"""Takes a chunk's verified bytes and the blocks where it belongs."""


class Wanted(NamedTuple):
    """A frame of a pack, and the blocks where its content goes."""

    offset: int
    length: int
    size: int
    chunk: ChunkId
    blocks: list[int]


class Zeros(NamedTuple):
    """A chunk of zeros, which is stored nowhere."""

    block: int
    blocks: int


class PackPlan(NamedTuple):
    """The frames to read from each pack, in order of offset, and what is zeros."""

    frames: dict[PackRef, list[Wanted]]
    zeros: list[Zeros]


def plan(chunk_map: ChunkMap, bases: Sequence[int]) -> PackPlan:
    """What to read for extents that begin at these blocks. Raises FormatError."""
    found: dict[PackRef, dict[int, Wanted]] = {pack: {} for pack in chunk_map.packs}
    zeros: list[Zeros] = []
    for extent, base in zip(chunk_map.extents, bases, strict=True):
        block = base
        for row, blocks in enumerate(extent.blocks):
            place = chunk_map.place(extent, row)
            if place is None:
                if extent.chunk_id(row) != zero_chunk_id(blocks):
                    where = f"extent {extent.diff_id}: chunk {row}"
                    raise FormatError("chunk map", where, 0, "has no frame and is not zeros")
                zeros.append(Zeros(block, blocks))
            else:
                chunk, size = extent.chunk_id(row), blocks * BLOCK_SIZE
                item = found[place.pack].setdefault(
                    place.offset, Wanted(place.offset, place.length, size, chunk, [])
                )
                if (item.chunk, item.length, item.size) != (chunk, place.length, size):
                    raise FormatError(
                        "chunk map", f"pack {place.pack.digest}", place.offset, "two chunks overlap"
                    )
                item.blocks.append(block)
            block += blocks
    return PackPlan(
        {pack: [items[k] for k in sorted(items)] for pack, items in found.items()}, zeros
    )


def read_pack(
    repository: Repository, pack: PackRef, frames: Sequence[Wanted], sink: Sink, advance: Advance
) -> None:
    """Gives each chunk to `sink` when it is verified; `advance` is told of bytes as they come.

    Raises DigestMismatch or FormatError naming what is damaged, and what the repository raises.
    """
    sha256 = hashlib.sha256()
    descriptor = Descriptor(media_types.PACK, pack.digest, pack.size)
    with repository.open_blob(descriptor) as stream:
        for item, raw in _frames(stream, frames, sha256.update, advance):
            record = f"pack {pack.digest}: frame at {item.offset}"
            content = frame.decompress_exact(raw, item.size, record=record)
            got = chunk_id(content)
            if got != item.chunk:
                raise DigestMismatch(record, item.chunk.hex(), got.hex())
            sink(content, item.blocks)
    if "sha256:" + sha256.hexdigest() != pack.digest:
        raise DigestMismatch("pack", pack.digest, "sha256:" + sha256.hexdigest())


def _frames(
    stream: ByteStream,
    frames: Sequence[Wanted],
    update: Callable[[bytes], None],
    advance: Advance,
) -> Iterator[tuple[Wanted, bytes]]:
    """Each frame's bytes, cut from the stream, which is read to its end."""
    buffer, start, number = bytearray(), 0, 0
    while data := stream.read(MIB):
        update(data)
        advance(len(data))
        buffer += data
        while number < len(frames):
            item = frames[number]
            first = item.offset - start
            if first + item.length > len(buffer):
                break
            yield item, bytes(buffer[first : first + item.length])
            number += 1
        keep = frames[number].offset if number < len(frames) else start + len(buffer)
        drop = min(max(keep - start, 0), len(buffer))
        del buffer[:drop]
        start += drop
    if number < len(frames):
        raise IntegrityError(f"a pack ends before its frame at {frames[number].offset}")
