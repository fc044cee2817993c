"""Log lines about failing reads, limited: a store that is away fails thousands a second."""

import logging
import threading
import time

LINES_MAX = 5
WINDOW_S = 10.0


class RateLimit:
    """Lets through the first messages of each window, and then says how many it kept back."""

    def __init__(
        self, logger: logging.Logger, lines: int = LINES_MAX, window_s: float = WINDOW_S
    ) -> None:
        self._logger = logger
        self._lines = lines
        self._window_s = window_s
        self._lock = threading.Lock()
        self._begin = 0.0
        self._count = 0

    def log(self, level: int, message: str, *args: object) -> None:
        now = time.monotonic()
        suppressed = 0
        with self._lock:
            if now - self._begin > self._window_s:
                suppressed = max(0, self._count - self._lines)
                self._begin, self._count = now, 0
            self._count += 1
            silent = self._count > self._lines
        if suppressed:
            self._logger.log(level, "%d more such lines were not logged", suppressed)
        if not silent:
            self._logger.log(level, message, *args)
