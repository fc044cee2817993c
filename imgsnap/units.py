"""Sizes: the block, binary units, rounding, and their text forms."""

import re

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

BLOCK_BITS = 12
BLOCK_SIZE = 1 << BLOCK_BITS

_UNITS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": GIB << 10}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", re.IGNORECASE)


def blocks_for(size: int) -> int:
    """Number of blocks that `size` bytes occupy."""
    return (size + BLOCK_SIZE - 1) >> BLOCK_BITS


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is not below `value`."""
    return -(-value // alignment) * alignment


def parse_size(text: str) -> int:
    """Bytes named by text such as ``64MiB``, ``1.5g`` or ``4096`` (binary units).

    Raises ValueError when the text is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"not a size: {text!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(size: int) -> str:
    """A size for people: ``0 B``, ``17 KiB``, ``1.2 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
