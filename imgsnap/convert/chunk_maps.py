"""Chunk maps joined."""

from collections.abc import Sequence
from dataclasses import replace

from imgsnap.formats.chunk_map import ZERO_PACK, ChunkMap, Extent, PackRef


def merge_chunk_maps(maps: Sequence[ChunkMap]) -> ChunkMap:
    """One map of all extents, each pack listed once, in order of first use."""
    numbers: dict[PackRef, int] = {}
    extents: list[Extent] = []
    for chunk_map in maps:
        renumbered = [numbers.setdefault(pack, len(numbers)) for pack in chunk_map.packs]
        for extent in chunk_map.extents:
            pack = extent.pack[:]
            for row, number in enumerate(pack):
                if number != ZERO_PACK:
                    pack[row] = renumbered[number]
            extents.append(replace(extent, pack=pack))
    return ChunkMap(tuple(numbers), tuple(extents))
