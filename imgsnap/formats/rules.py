"""The versioned rules that make a layer's conversion a pure function of its diffID.

Two conversions with equal rules give equal layer indexes and equal extents; a change of any rule
gives a new `Rules.id` and so never meets artefacts of the old one. See docs/format.md, "Rules".
"""

import hashlib
from dataclasses import dataclass

from imgsnap.errors import UnsupportedFormat
from imgsnap.units import BLOCK_SIZE, KIB, MIB

INDEX_RULE = 1
EXTENT_RULE = 2
CHUNK_RULE = 1
CHUNK_SIZE_LIMIT = 4 * MIB
"""No chunk is larger than this, whatever its rules say; readers allocate no more for one."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Rule versions and the chunk cutter's parameters (bytes)."""

    chunk_target: int = 256 * KIB
    chunk_min: int = 64 * KIB
    chunk_max: int = 512 * KIB
    index: int = INDEX_RULE
    extent: int = EXTENT_RULE
    chunk: int = CHUNK_RULE

    def __post_init__(self) -> None:
        if (self.index, self.extent, self.chunk) != (INDEX_RULE, EXTENT_RULE, CHUNK_RULE):
            raise UnsupportedFormat(
                f"conversion rules index={self.index} extent={self.extent} chunk={self.chunk} "
                "are unknown to this version",
                hint="use a newer imgsnap, or convert the image again with this one",
            )
        sizes = (self.chunk_min, self.chunk_target, self.chunk_max)
        if any(size % BLOCK_SIZE or size <= 0 for size in sizes) or not (
            self.chunk_min <= self.chunk_target <= self.chunk_max
            and self.chunk_target + self.chunk_min <= CHUNK_SIZE_LIMIT
            and self.chunk_max <= CHUNK_SIZE_LIMIT
        ):
            raise UnsupportedFormat(f"chunk sizes {sizes} are not usable")

    @property
    def text(self) -> str:
        """The canonical text form, stored in snapshot configs."""
        return (
            f"index={self.index},extent={self.extent},chunk={self.chunk},"
            f"target={self.chunk_target},min={self.chunk_min},max={self.chunk_max}"
        )

    @property
    def id(self) -> str:
        """Eight hex digits that name this set of rules in tags."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]
