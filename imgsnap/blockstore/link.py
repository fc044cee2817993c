"""The link: how long a round trip takes, how fast bytes come, and so how much to have in flight.

The window for background ranges is what keeps the link busy and no more: the bytes of two round
trips, since the next range is asked for while the last one is on its way, and QUEUE_S on top. What
a demand read can find queued before it on the link is therefore bounded by QUEUE_S and one round
trip. The rate is the largest of the last few intervals in which the window was the limit, so the
window at least doubles each round trip until the link is full (after BBR, draft-cardwell-iccrg).
"""

import time
from collections import deque
from collections.abc import Callable

from imgsnap.units import KIB, MIB

FLIGHT_BYTES_MAX = 64 * MIB
"""Asked for and not yet here, in all, per block store: 0.5 s at 1 Gbit/s."""
WINDOW_FIRST = 2 * MIB
"""Before anything is known, and …"""
WINDOW_FIRST_MAX = 16 * MIB
RATE_FIRST = 50e6
"""… as soon as the round trip is: two of them at this rate, up to WINDOW_FIRST_MAX."""
RATES_FIRST = 3
"""Intervals before a low rate is believed: the first ones hold gaps of a pipe that fills."""
WINDOW_MIN = 256 * KIB
QUEUE_S = 0.1
BACKGROUND_RANGE_MIN = 512 * KIB
BACKGROUND_RANGE_MAX = 4 * MIB
RANGES_PER_WINDOW = 4
"""The window is split among this many ranges, so that the link is busy while one is asked for."""
RATE_INTERVAL_S = 0.25
"""Bytes are counted a frame at a time: shorter intervals would measure luck."""
RATE_SAMPLES = 10
ROUND_TRIP_LIFE_S = 15.0
"""The shortest time to first byte is believed so long. Then the pipe is drained for one sample:
with a full pipe each sample has the queue in it, and a window computed from it feeds on itself."""


class Link:
    """Not thread safe. `clock` in seconds; sizes in bytes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._round_trip_s: float | None = None
        self._measured_at = 0.0
        self._rates: deque[float] = deque(maxlen=RATE_SAMPLES)
        self._interval_at: float | None = None
        self._interval_bytes = 0

    @property
    def round_trip_s(self) -> float | None:
        """Shortest recent time from a request to its first byte; None before the first."""
        return self._round_trip_s

    @property
    def rate(self) -> float:
        """Bytes per second; 0 before the first interval."""
        return max(self._rates, default=0.0)

    def started(self) -> None:
        """Something is in flight after nothing was: an interval begins with its first byte."""
        self._interval_at = None

    def first_byte(self, seconds: float, *, quiet: bool) -> None:
        """A request's time to first byte; `quiet` when it found the pipe almost empty."""
        if self._round_trip_s is None or seconds <= self._round_trip_s or (quiet and self._old):
            self._round_trip_s, self._measured_at = seconds, self._clock()

    def arrived(self, size: int, *, limited: bool) -> None:
        """Bytes have come; `limited` when more would have been asked for but for the window."""
        now = self._clock()
        if self._interval_at is None:
            self._interval_at, self._interval_bytes = now, 0
            return
        self._interval_bytes += size
        seconds = now - self._interval_at
        if seconds < max(RATE_INTERVAL_S, self._round_trip_s or 0.0):
            return
        rate = self._interval_bytes / seconds
        if limited or rate > self.rate:
            self._rates.append(rate)
        self._interval_at, self._interval_bytes = now, 0

    @property
    def window(self) -> int:
        """How many background bytes may be in flight."""
        if self._round_trip_s is None:
            return WINDOW_FIRST
        if self._old:
            return WINDOW_MIN
        wanted = self.rate * (2 * self._round_trip_s + QUEUE_S)
        least: float = WINDOW_MIN
        if len(self._rates) < RATES_FIRST:
            least = min(max(RATE_FIRST * 2 * self._round_trip_s, WINDOW_FIRST), WINDOW_FIRST_MAX)
        return int(min(max(wanted, least), FLIGHT_BYTES_MAX))

    @property
    def trip_bytes(self) -> int:
        """Bytes that come in a round trip; 0 before anything is known."""
        return int(self.rate * (self._round_trip_s or 0.0))

    @property
    def background_range(self) -> int:
        """How much one background range may ask for."""
        size = self.window // RANGES_PER_WINDOW
        return min(max(size, BACKGROUND_RANGE_MIN), BACKGROUND_RANGE_MAX)

    @property
    def _old(self) -> bool:
        return self._clock() - self._measured_at > ROUND_TRIP_LIFE_S
