"""Readahead: says what to fetch before it is asked for.

A read somewhere new opens a window at once: what follows on the device are the files beside it,
and a start whose misses go one after the other leaves the link idle for most of every round trip.
Where reading goes on, the window doubles, so that several ranges are in flight, up to what keeps
the link busy; the kernel by itself reads ahead one FUSE request at a time, 20 MB/s at best over
50 ms.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from imgsnap.blockstore.read_options import WINDOW_MAX
from imgsnap.units import KIB, MIB

WINDOW_FIRST = 512 * KIB
"""Over 100 Mbit/s and 10 ms a cold Python start took 0.85 of its time with this window at the first
read instead of the second, for 2 % more bytes; 1 MiB took 0.8 for 16 % more."""
WINDOWS_SCAN = ((0.15, MIB), (0.23, 2 * MIB))
"""The first window where so large a share of the chunks has been brought in: what a reader of so
much asks for next is likely to be near. In two steps, as a start may end at the first: who wants
1 % of a large image's files, chosen by chance, is brought 18 % of its chunks."""
WINDOW_USUAL = 8 * MIB
"""What a window grows to on any link: about 3 MiB of compressed chunks."""
GROWTH_LONG = 4
"""A window grows so fast where it has far to go: each step costs a round trip there."""
DEVICE_BYTES_PER_LINK_BYTE = 3
"""Packs are about a third of the device."""
STREAMS_MAX = 32
"""Readers that are told apart; the one that was idle longest is forgotten."""
JUMP_MAX = 128 * KIB
"""A gap this small still continues a stream: files that follow each other on the device are read
with their last pages missing, and workers answer the kernel's requests out of order."""


@dataclass(slots=True)
class _Stream:
    """One sequential reader; offsets in bytes of the device."""

    next: int  # where its next read is expected
    ahead: int  # everything below has been asked for
    window: int


class Readahead:
    """The streams of one device. Safe for threads; `link_window` says how many bytes in flight keep
    the link busy."""

    def __init__(
        self,
        size: int,
        window_max: int = WINDOW_MAX,
        link_window: Callable[[], int] | None = None,
    ) -> None:
        self._size = size
        self._window_max = window_max
        self._link_window = link_window
        self._window_first = min(WINDOW_FIRST, window_max)
        self._lock = threading.Lock()
        self._serial = 0
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def brought(self, share: float) -> None:
        """Takes note of the share of the snapshot's chunks that reads have brought in."""
        for least, window in WINDOWS_SCAN:
            if share >= least:
                self._window_first = min(window, self._window_max)

    def after(self, offset: int, length: int) -> tuple[int, int] | None:
        """Takes note of a read; the range [start, end) to fetch now, if any."""
        end = offset + length
        with self._lock:
            stream = self._find(offset, length)
            if stream is None:
                self._serial += 1
                window = self._window_first
                ahead = min(end + window, self._size)
                self._streams[self._serial] = _Stream(end, ahead, window)
                if len(self._streams) > STREAMS_MAX:
                    self._streams.popitem(last=False)
                return (end, ahead) if end < ahead else None
            stream.next = max(stream.next, end)
            return self._advance(stream)

    def _find(self, offset: int, length: int) -> _Stream | None:
        slack = max(length, JUMP_MAX)
        for serial, stream in reversed(self._streams.items()):
            if -slack <= offset - stream.next <= JUMP_MAX:
                self._streams.move_to_end(serial)
                return stream
        return None

    def _largest(self) -> int:
        link = self._link_window() * DEVICE_BYTES_PER_LINK_BYTE if self._link_window else 0
        return min(max(WINDOW_USUAL, link), self._window_max)

    def _advance(self, stream: _Stream) -> tuple[int, int] | None:
        """Asks for the next piece when half of the window has been read; on a link that needs a
        large one, when a quarter has."""
        largest = self._largest()
        long = largest > WINDOW_USUAL
        if stream.ahead - stream.next > stream.window * (3 if long else 2) // 4:
            return None
        grown = stream.window * (GROWTH_LONG if long else 2)
        stream.window = max(stream.window, min(grown, largest))
        start = max(stream.ahead, stream.next)
        stream.ahead = min(stream.next + stream.window, self._size)
        return (start, stream.ahead) if start < stream.ahead else None
