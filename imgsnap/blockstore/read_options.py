"""How one snapshot is read: what a user can choose, and what is chosen for him.

Apart from the block store, because commands and the control process hand these on and read nothing.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from imgsnap.units import MIB

WINDOW_MAX = 256 * MIB
"""What a readahead window grows to on links that need it: 0.5 s at 1 Gbit/s, compressed to a third
and a quarter of it asked for anew at a time."""
DEADLINE_S = 60.0
"""Of one read: a registry that restarts is back by then."""


class Prefetch(StrEnum):
    """What is fetched that nobody has asked for, beside readahead."""

    OFF = "off"
    PACK = "pack"  # the boot pack, and everything once most of it has been read
    ALL = "all"


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How one snapshot is read."""

    readahead_max: int = WINDOW_MAX  # bytes; 0 switches readahead off
    deadline_s: float = DEADLINE_S  # of one read
    prefetch: str = Prefetch.PACK  # what is fetched unasked; see Prefetch
    prefetch_rate: int = 0  # bytes of packs per second in the background; 0: no limit
    boot_pack: tuple[str, ...] = ()  # names by preference, `boot_choice.AUTO` for any; () for none
    trace: bool = False  # note which blocks are read
    exact: bool = False  # the kernel is to ask for what is read and no more, for a trace
    disk: bool = False  # VMMs read the file itself, many of them: the kernel is to cache it
    image_config: bool = False  # have the source image's config cached afterwards


def read_options(value: dict[str, Any]) -> ReadOptions:
    """From what `asdict` made of them and JSON of that. Raises TypeError."""
    return ReadOptions(**{**value, "boot_pack": tuple(value.get("boot_pack", ()))})
