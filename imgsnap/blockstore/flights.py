"""What is in flight: ranges under way, their bytes, and which of them to ask for a second time."""

import math
import time
from collections import deque
from collections.abc import Callable

from imgsnap.blockstore.fetch_queue import RANGE_SIZE_MAX, FetchRange, Priority
from imgsnap.blockstore.link import FLIGHT_BYTES_MAX, WINDOW_MIN, Link
from imgsnap.oci.cancellation import Cancellation

READERS_PAUSE_S = 0.5
"""Without a demand request for so long, readers are not being held up by the link."""
FILL_TRIPS = 2
"""With one the link idles a fifth of the time, since a registry answers later than the shortest
round trip says. With three, readers that stop soon are held up: who wanted 5 % of a large image's
bytes took 1.21 of his time alone, 1.07 with two (100 Mbit/s, 10 ms)."""
HEDGE_FACTOR = 3
"""A first byte is late after so many times what 95 of 100 took."""
HEDGE_AFTER_MIN_S = 0.05
HEDGE_AFTER_UNKNOWN_S = 1.0
LATENCIES_KEPT = 128
LATENCIES_MIN = 16
HEDGE_SHARE = 0.05
"""Second requests per demand request, at most …"""
HEDGE_BURST = 2
"""… and these on top, so that the first slow range of a mount may be hedged."""


class Flight:
    """A range under way. `rival` is the other flight for the same chunks, after a hedge."""

    __slots__ = (
        *("answered", "cancellation", "hedged", "left", "lost"),
        *("quiet", "range", "rival", "second", "started"),
    )

    def __init__(self, taken: FetchRange, started: float, *, second: bool = False) -> None:
        deadlines = [
            batch.deadline
            for task in taken.tasks
            for batch in task.waiters
            if batch.priority is Priority.DEMAND and not batch.finished
        ]
        self.range = taken
        self.cancellation = Cancellation(max(deadlines, default=None))
        self.started = started
        self.left = taken.end - taken.start
        self.quiet = False
        self.answered = taken.pack is None
        self.hedged = second
        self.second = second
        self.lost = False
        self.rival: Flight | None = None

    @property
    def background(self) -> bool:
        return self.range.priority is not Priority.DEMAND

    @property
    def awaited(self) -> bool:
        """Whether a reader waits for something of it, also one who joined it under way."""
        return any(
            batch.priority is Priority.DEMAND and not batch.finished
            for task in self.range.tasks
            if not task.done
            for batch in task.waiters
        )


class Flights:
    """Not thread safe: the fetcher calls it under its lock. Times are of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.link = Link(clock)
        self.background = 0  # flights
        self._clock = clock
        self._flights: set[Flight] = set()
        self._bytes = 0
        self._background_bytes = 0
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._late_after: float | None = None
        self._demanded = 0
        self._demanded_at = -math.inf
        self._hedges = 0

    @property
    def count(self) -> int:
        return len(self._flights)

    # Room ------------------------------------------------------------------------------------

    @property
    def demand_room(self) -> int:
        """How large a demand range may be; 0 when the budget of bytes in flight is used up."""
        return RANGE_SIZE_MAX if self._bytes < FLIGHT_BYTES_MAX else 0

    @property
    def background_room(self) -> int:
        """How large a background range may be; 0 when none may begin."""
        size = self.link.background_range
        room = min(self.link.window - self._background_bytes, FLIGHT_BYTES_MAX - self._bytes)
        return min(size, room) if room >= size // 2 else 0

    @property
    def prefetch_room(self) -> int:
        """How large a range that nobody waits for may be; 0 when none may begin.

        While readers fetch, what fills the gaps between their round trips: in flight, with all
        that readers asked for, is what the link carries in FILL_TRIPS of them.
        """
        room = self.background_room
        if not room or self._clock() - self._demanded_at > READERS_PAUSE_S:
            return room
        return min(room, max(FILL_TRIPS * self.link.trip_bytes - self._bytes, not self._flights))

    # A flight's life -------------------------------------------------------------------------

    def begin(self, taken: FetchRange, *, rival: Flight | None = None) -> Flight:
        """A range is asked for, or asked for again beside its `rival`."""
        flight = Flight(taken, self._clock(), second=rival is not None)
        if rival is not None:
            flight.rival, rival.rival, rival.hedged = rival, flight, True
            self._hedges += 1
        if not self._flights:
            self.link.started()
        flight.quiet = self._bytes <= WINDOW_MIN
        self._flights.add(flight)
        self._bytes += flight.left
        if flight.background:
            self.background += 1
            self._background_bytes += flight.left
        elif rival is None and taken.pack is not None:
            self._demanded += 1
            self._demanded_at = flight.started
        return flight

    def answer(self, flight: Flight) -> None:
        """The first byte is here."""
        if flight.answered:
            return
        flight.answered = True
        seconds = self._clock() - flight.started
        self.link.first_byte(seconds, quiet=flight.quiet)
        self._latencies.append(seconds)
        self._late_after = None

    def arrive(self, flight: Flight, size: int, *, limited: bool) -> None:
        """Bytes of a flight are here."""
        size = min(size, flight.left)
        self._land(flight, size)
        self.link.arrived(size, limited=limited)

    def end(self, flight: Flight) -> None:
        """Nothing more will come."""
        self._land(flight, flight.left)
        self._flights.discard(flight)
        flight.answered = True
        if flight.background:
            self.background -= 1

    def _land(self, flight: Flight, size: int) -> None:
        flight.left -= size
        self._bytes -= size
        if flight.background:
            self._background_bytes -= size

    def cancel_all(self) -> None:
        for flight in self._flights:
            flight.cancellation.cancel()

    # Hedges ----------------------------------------------------------------------------------

    @property
    def late_after_s(self) -> float:
        """How long a first byte may take before the range is asked for again."""
        if self._late_after is None:
            known = sorted(self._latencies)
            if len(known) < LATENCIES_MIN:
                self._late_after = HEDGE_AFTER_UNKNOWN_S
            else:
                late = known[len(known) * 95 // 100] * HEDGE_FACTOR
                self._late_after = max(late, HEDGE_AFTER_MIN_S)
        return self._late_after

    def next_late(self) -> float | None:
        """When the next flight will be late; None when none can be, or none may be hedged."""
        if self._hedges >= self._demanded * HEDGE_SHARE + HEDGE_BURST:
            return None
        waiting = [f.started for f in self._flights if not (f.answered or f.hedged) and f.awaited]
        return min(waiting) + self.late_after_s if waiting else None

    def take_late(self) -> Flight | None:
        """A second flight for one that is late; the caller makes its request."""
        due, now = self.next_late(), self._clock()
        if due is None or due > now:
            return None
        for slow in self._flights:
            if slow.started + self.late_after_s <= now and not (slow.answered or slow.hedged):
                tasks = [task for task in slow.range.tasks if not task.done]
                if tasks and slow.awaited:
                    return self.begin(slow.range._replace(tasks=tasks), rival=slow)
        return None
