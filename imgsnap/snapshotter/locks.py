"""A lock for each key that somebody wants at the moment."""

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class KeyedLocks:
    """Locks that come and go with those who hold or await them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[Hashable, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: Hashable) -> Iterator[None]:
        """Waits until nobody else holds `key`."""
        with self._lock(key) as lock, lock:
            yield

    @contextmanager
    def attempt(self, key: Hashable) -> Iterator[bool]:
        """Does not wait; whether `key` is held in the block."""
        with self._lock(key) as lock:
            held = lock.acquire(blocking=False)
            try:
                yield held
            finally:
                if held:
                    lock.release()

    @contextmanager
    def _lock(self, key: Hashable) -> Iterator[threading.Lock]:
        with self._guard:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = lock, users + 1
        try:
            yield lock
        finally:
            with self._guard:
                lock, users = self._locks.pop(key)
                if users > 1:
                    self._locks[key] = lock, users - 1
