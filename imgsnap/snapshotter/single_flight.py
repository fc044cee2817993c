"""One look-up for all who ask the same at the same time, and an end to everybody's patience.

A registry that has stalled cannot be interrupted from outside: the look-up has a thread of its own,
which is left behind when time is up and ends with its transport's timeouts. What it finds then
still counts, because it records its answer itself.
"""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from imgsnap.errors import Unavailable

T = TypeVar("T")


@dataclass(slots=True)
class _Flight(Generic[T]):
    deadline: float
    done: threading.Event = field(default_factory=threading.Event)
    results: list[T] = field(default_factory=list)  # one, or none when there is an error
    error: BaseException | None = None


class SingleFlight(Generic[T]):
    """Thread safe."""

    def __init__(
        self, flights_max: int, limit_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._flights_max = flights_max
        self._limit_s = limit_s
        self._clock = clock
        self._flights: dict[Hashable, _Flight[T]] = {}
        self._lock = threading.Lock()

    def run(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns or raises; of those who ask for a key at a time, one's is run.

        Raises Unavailable when the flight has been under way for the time limit, and at once when
        too many flights are.
        """
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                if len(self._flights) >= self._flights_max:
                    raise Unavailable(f"{self._flights_max} look-ups are under way")
                flight = self._flights[key] = _Flight(self._clock() + self._limit_s)
                arguments = (key, flight, work)
                threading.Thread(
                    target=self._fly, args=arguments, name="look-up", daemon=True
                ).start()
        if not flight.done.wait(max(0.0, flight.deadline - self._clock())):
            raise Unavailable(f"no answer in {self._limit_s:g} s")
        if flight.error is not None:
            raise flight.error
        return flight.results[0]

    def _fly(self, key: Hashable, flight: _Flight[T], work: Callable[[], T]) -> None:
        try:
            flight.results.append(work())
        except BaseException as error:
            flight.error = error
        finally:
            with self._lock:
                del self._flights[key]
            flight.done.set()
