"""Sequential readahead: notices streams of reads and says what to fetch before it is asked for.

The kernel reads ahead at most one FUSE request at a time, which over a link of 50 ms is 20 MB/s
at best. A stream's window here doubles up to `window_max`, so that several ranges are in flight.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from imgsnap.units import KIB, MIB

WINDOW_FIRST = 512 * KIB
WINDOW_MAX = 8 * MIB
"""About eight ranges of compressed chunks in flight for one stream at most."""
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
    window: int  # 0 until a second read has continued the first


class Readahead:
    """The streams of one device. Safe for threads."""

    def __init__(self, size: int, window_max: int = WINDOW_MAX) -> None:
        self._size = size
        self._window_max = window_max
        self._lock = threading.Lock()
        self._serial = 0
        self._streams: OrderedDict[int, _Stream] = OrderedDict()

    def after(self, offset: int, length: int) -> tuple[int, int] | None:
        """Takes note of a read; the range [start, end) to fetch now, if any."""
        end = offset + length
        with self._lock:
            stream = self._find(offset, length)
            if stream is None:
                self._serial += 1
                self._streams[self._serial] = _Stream(end, end, 0)
                if len(self._streams) > STREAMS_MAX:
                    self._streams.popitem(last=False)
                return None
            stream.next = max(stream.next, end)
            return self._advance(stream)

    def _find(self, offset: int, length: int) -> _Stream | None:
        slack = max(length, JUMP_MAX)
        for serial, stream in reversed(self._streams.items()):
            if -slack <= offset - stream.next <= JUMP_MAX:
                self._streams.move_to_end(serial)
                return stream
        return None

    def _advance(self, stream: _Stream) -> tuple[int, int] | None:
        """Asks for the next piece when half of the window has been read."""
        if stream.ahead - stream.next > stream.window // 2:
            return None
        first = min(WINDOW_FIRST, self._window_max)
        stream.window = min(max(stream.window * 2, first), self._window_max)
        start = max(stream.ahead, stream.next)
        stream.ahead = min(stream.next + stream.window, self._size)
        return (start, stream.ahead) if start < stream.ahead else None
