"""How much a process may still write to the node cache before it looks at the quota again.

Looking costs a walk over the cache, so it is not done for each write: a process gets a budget,
a look is taken in the background when half of it is gone, and what comes after the last byte of
it is not stored. A cache may therefore be over its quota by at most WRITE_BUDGET for each process
that writes to it, until they have looked.
"""

import logging
import threading
import time
from collections.abc import Callable

from imgsnap.units import MIB, format_size

WRITE_BUDGET = 128 * MIB
"""Bytes that a process writes without looking at the quota: the bound on going over it."""
RETRY_S = 5.0
"""A cache that had no room is looked at again after this long."""
LOOK_WAIT_S = 2.0
"""A write waits this long for a look that is under way, and is then not stored."""

_log = logging.getLogger(__name__)


class WriteBudget:
    """Safe for threads.

    `look` evicts what it may and returns the bytes of room below the quota, which may be negative,
    or None without a quota. It runs in a thread of its own.
    """

    def __init__(self, look: Callable[[], int | None], size: int = WRITE_BUDGET) -> None:
        self._look_at = look
        self._size = size
        self._changed = threading.Condition()
        self._left = size
        self._pending = 0  # taken and perhaps not on disk yet
        self._unseen = 0  # of the look under way: bytes that it may have missed
        self._looking = False
        self._begun = False
        self._next_look = 0.0
        self._refusing = False

    @property
    def storing(self) -> bool:
        """False while the cache is full and nothing in it may go."""
        return not self._refusing

    def take(self, size: int) -> bool:
        """Whether `size` bytes may be stored; if so, call `done` when they are, or failed to be.

        One item larger than the budget counts as it.
        """
        size = min(size, self._size)
        with self._changed:
            if self._left - size < self._size // 2 or not self._begun:
                self._want_look()
            if size > self._left and self._looking:
                self._changed.wait_for(lambda: not self._looking, LOOK_WAIT_S)
            if size > self._left:
                self._refuse()
                return False
            self._left -= size
            self._pending += size
            self._unseen += size
            return True

    def look(self) -> None:
        """Looks in the background now, unless that has just been done."""
        with self._changed:
            self._want_look()

    def done(self, size: int) -> None:
        """What was taken is on disk now, or never will be."""
        with self._changed:
            self._pending -= min(size, self._size)

    def _refuse(self) -> None:
        if not self._refusing and not self._looking:
            self._refusing = True
            _log.warning("the node cache is at its quota and all in use: serving without storing")

    def _want_look(self) -> None:
        if self._looking or time.monotonic() < self._next_look:
            return
        self._begun = self._looking = True
        self._unseen = self._pending
        threading.Thread(target=self._run, name="cache-quota", daemon=True).start()

    def _run(self) -> None:
        room: int | None = None
        try:
            room = self._look_at()
        except Exception:
            _log.exception("looking at the node cache's quota failed")
        with self._changed:
            granted = self._size
            if room is not None:
                granted = max(0, min(self._size, room - self._unseen))
            self._left = granted
            self._looking = False
            self._next_look = time.monotonic() + RETRY_S if granted < self._size // 2 else 0.0
            if self._refusing and granted:
                self._refusing = False
                _log.warning("the node cache stores again: %s of room", format_size(granted))
            self._changed.notify_all()
