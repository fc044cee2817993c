"""One flight for all; errors for all; nobody waits longer than the limit."""

import threading

import pytest

from imgsnap.errors import NotFound, Unavailable
from imgsnap.snapshotter.single_flight import SingleFlight


def test_an_error_is_everybodys_and_the_next_flight_is_new():
    flights: SingleFlight[int] = SingleFlight(4, 60)

    def fail() -> int:
        raise NotFound("gone")

    with pytest.raises(NotFound):
        flights.run("a", fail)
    assert flights.run("a", lambda: 1) == 1


def test_keys_do_not_wait_for_each_other_and_are_bounded():
    flights: SingleFlight[int] = SingleFlight(2, 0.02)
    gate = threading.Event()
    for key in "ab":
        with pytest.raises(Unavailable, match="no answer"):
            flights.run(key, lambda: int(gate.wait(60)))
    with pytest.raises(Unavailable, match="under way"):
        flights.run("c", lambda: 1)
    gate.set()
    for _ in range(2000):
        try:
            assert flights.run("c", lambda: 1) == 1
            return
        except Unavailable:
            threading.Event().wait(0.01)
    raise AssertionError("the flights did not end")


def test_who_comes_late_waits_for_the_rest_only():
    """The limit is the flight's: a clock that has passed it gives up at once."""
    now = 0.0
    flights: SingleFlight[int] = SingleFlight(2, 0.05, clock=lambda: now)
    gate = threading.Event()
    with pytest.raises(Unavailable):
        flights.run("a", lambda: int(gate.wait(60)))
    now = 1e9
    with pytest.raises(Unavailable):
        flights.run("a", lambda: int(gate.wait(60)))
    gate.set()
