"""Which blocks of a device were read, in the order of their first reads: the source of traces."""

from array import array
from collections.abc import Iterator

from imgsnap.units import BLOCK_BITS

BLOCKS_MAX = 1 << 17
"""512 MiB of first reads; what comes later is not noted. 8 bytes a read and an integer for each
64 blocks of which one was read: 2 MiB when reads lie together, 17 MiB when they never do."""
_COUNT_BITS = 20
"""A read has less than 2^20 blocks."""
_PAGE_BITS = 6
_PAGE_MASK = (1 << _PAGE_BITS) - 1


class TouchLog:
    """On the path of every read: a microsecond.

    Two threads that read one block for the first time at once may both note it; `runs` drops the
    second.
    """

    def __init__(self) -> None:
        self._runs = array("Q")
        self._pages: dict[int, int] = {}  # 64 blocks each, a bit for every one that was read
        self._blocks = 0

    @property
    def full(self) -> bool:
        return self._blocks >= BLOCKS_MAX

    def note(self, offset: int, length: int) -> None:
        """A read of these bytes of the device."""
        first = offset >> BLOCK_BITS
        last = (offset + length - 1) >> BLOCK_BITS
        page = first >> _PAGE_BITS
        if page == last >> _PAGE_BITS:
            seen = self._pages.get(page, 0)
            mask = ((2 << last - first) - 1) << (first & _PAGE_MASK)
            if seen & mask == mask:
                return
            if not seen & mask:
                self._add(page, mask, first, last + 1)
                return
        self._note_slowly(first, last + 1)

    def _note_slowly(self, first: int, end: int) -> None:
        """Blocks [first, end) in several pages, or of which some were read before."""
        while first < end and not self.full:
            page = first >> _PAGE_BITS
            stop = min(end, (page + 1) << _PAGE_BITS)
            mask = ((1 << stop - first) - 1) << (first & _PAGE_MASK)
            seen = self._pages.get(page, 0)
            if not seen & mask:
                self._add(page, mask, first, stop)
            elif seen & mask != mask:
                for block in range(first, stop):
                    if not seen >> (block & _PAGE_MASK) & 1:
                        self._add(page, 1 << (block & _PAGE_MASK), block, block + 1)
            first = stop

    def _add(self, page: int, mask: int, first: int, end: int) -> None:
        if self._blocks < BLOCKS_MAX:
            self._pages[page] = self._pages.get(page, 0) | mask
            self._runs.append(first << _COUNT_BITS | end - first)
            self._blocks += end - first

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
