"""Which blocks of a device were read, in the order of their first reads: the source of traces."""

from array import array
from collections.abc import Iterator

from imgsnap.formats.trace import TOUCHES_MAX
from imgsnap.units import BLOCK_BITS

_COUNT_BITS = 20
"""A read has at most 2^20 blocks."""
_PAGE_BITS = 6


class TouchLog:
    """Bounded: TOUCHES_MAX runs of 8 bytes, and one integer for 64 blocks that were read.

    Two threads that read one block for the first time at once may both note it; `runs` drops the
    second.
    """

    def __init__(self) -> None:
        self._runs = array("Q")
        self._pages: dict[int, int] = {}

    @property
    def full(self) -> bool:
        return len(self._runs) >= TOUCHES_MAX

    def note(self, offset: int, length: int) -> None:
        """A read of these bytes of the device."""
        first = offset >> BLOCK_BITS
        last = (offset + length - 1) >> BLOCK_BITS
        pages = self._pages
        start = first
        for page in range(first >> _PAGE_BITS, (last >> _PAGE_BITS) + 1):
            low = max(first, page << _PAGE_BITS)
            high = min(last + 1, (page + 1) << _PAGE_BITS)
            mask = ((1 << (high - low)) - 1) << (low & (1 << _PAGE_BITS) - 1)
            seen = pages.get(page, 0)
            if seen & mask == mask:
                self._add(start, low)
                start = high
                continue
            if seen & mask:  # part of it: rare enough to go block by block
                self._add(start, low)
                for block in range(low, high):
                    if not seen >> (block & (1 << _PAGE_BITS) - 1) & 1:
                        self._add(block, block + 1)
                start = high
            pages[page] = seen | mask
        self._add(start, last + 1)

    def _add(self, first: int, end: int) -> None:
        if first < end and len(self._runs) < TOUCHES_MAX:
            self._runs.append(first << _COUNT_BITS | end - first)

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first block, count), each block once."""
        seen: set[int] = set()
        for run in list(self._runs):
            first, count = run >> _COUNT_BITS, run & (1 << _COUNT_BITS) - 1
            new = [block for block in range(first, first + count) if block not in seen]
            seen.update(new)
            start = 0
            for at in range(1, len(new) + 1):
                if at == len(new) or new[at] != new[at - 1] + 1:
                    yield new[start], at - start
                    start = at
