"""The window of background ranges follows the link; late ranges are asked for again, not often."""

import pytest

from imgsnap.blockstore.link import (
    BACKGROUND_RANGE_MAX,
    FLIGHT_BYTES_MAX,
    QUEUE_S,
    ROUND_TRIP_LIFE_S,
    WINDOW_FIRST,
    WINDOW_FIRST_MAX,
    WINDOW_MIN,
    Link,
)
from imgsnap.units import KIB, MIB

FRAME = 100 * KIB


class Pipe:
    """A link of given rate and round trip that always has a window of bytes asked for.

    Time passes by the bytes it delivers: the rate is the line's, or the window per round trip.
    """

    def __init__(self, rate: float, round_trip_s: float) -> None:
        self.now = 100.0
        self.link = Link(lambda: self.now)
        self.rate = rate
        self.round_trip_s = round_trip_s
        self.link.started()

    @property
    def queue_s(self) -> float:
        """What the bytes asked for wait behind each other."""
        return max(0.0, self.link.window / self.rate - self.round_trip_s)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            rate = min(self.rate, self.link.window / self.round_trip_s)
            self.now += FRAME / rate
            self.link.arrived(FRAME, limited=True)
            self.link.first_byte(self.round_trip_s + self.queue_s, quiet=False)


@pytest.mark.parametrize(
    ("rate", "round_trip_s"), [(12.5e6, 0.01), (125e6, 0.002), (3.1e6, 0.03), (125e6, 0.2)]
)
def test_the_window_fills_the_link_and_bounds_the_queue(rate, round_trip_s):
    pipe = Pipe(rate, round_trip_s)
    assert pipe.link.window == WINDOW_FIRST
    pipe.link.first_byte(round_trip_s, quiet=True)
    assert WINDOW_FIRST <= pipe.link.window <= WINDOW_FIRST_MAX
    pipe.run(5)
    assert pipe.link.window >= min(1.5 * rate * round_trip_s, FLIGHT_BYTES_MAX) * 0.9
    assert pipe.queue_s <= round_trip_s + QUEUE_S * 1.1
    assert pipe.link.background_range <= BACKGROUND_RANGE_MAX


def test_reads_that_leave_the_link_idle_say_nothing_about_its_rate():
    pipe = Pipe(125e6, 0.01)
    pipe.link.first_byte(0.01, quiet=True)
    pipe.run(2)
    window = pipe.link.window
    for _ in range(100):
        pipe.now += 0.1
        pipe.link.first_byte(0.01, quiet=True)
        pipe.link.arrived(4 * KIB, limited=False)
    assert pipe.link.window == window


def test_the_pipe_is_drained_to_measure_the_round_trip_anew():
    pipe = Pipe(12.5e6, 0.01)
    pipe.link.first_byte(0.01, quiet=True)
    pipe.run(1)
    pipe.now += ROUND_TRIP_LIFE_S
    assert pipe.link.window == WINDOW_MIN
    pipe.link.first_byte(5.0, quiet=False)  # it waited in the queue
    assert pipe.link.window == WINDOW_MIN
    pipe.link.first_byte(0.05, quiet=True)  # the route has changed
    assert pipe.link.round_trip_s == 0.05
    assert pipe.link.window > MIB


def test_a_window_that_grows_from_a_small_rate_at_least_doubles_each_round_trip():
    pipe = Pipe(125e6, 0.3)
    pipe.link.first_byte(0.3, quiet=True)
    for _ in range(4):
        pipe.now += 0.3
        pipe.link.arrived(300 * KIB, limited=True)
    before = pipe.link.window
    pipe.run(0.6)
    assert pipe.link.window >= 2 * before
