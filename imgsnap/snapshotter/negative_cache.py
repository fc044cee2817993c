"""Remembers for a while that there is nothing to be found."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable


class NegativeCache:
    """Bounded; the answer that was used least recently goes first. Thread safe."""

    def __init__(self, entries_max: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._entries_max = entries_max
        self._clock = clock
        self._until: OrderedDict[Hashable, float] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, key: Hashable, ttl_s: float) -> None:
        """Nothing will be found for `key` for this long."""
        with self._lock:
            self._until[key] = self._clock() + ttl_s
            self._until.move_to_end(key)
            if len(self._until) > self._entries_max:
                self._until.popitem(last=False)

    def forget(self, key: Hashable) -> None:
        with self._lock:
            self._until.pop(key, None)

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            until = self._until.get(key)
            if until is None:
                return False
            if until <= self._clock():
                del self._until[key]
                return False
            self._until.move_to_end(key)
            return True

    def __len__(self) -> int:
        with self._lock:
            return len(self._until)
