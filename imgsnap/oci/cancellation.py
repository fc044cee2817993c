"""Ending a request from another thread, and before a moment.

A thread that waits for an answer sits in recv(). Shutting its socket down is the one thing that
wakes it there, so whoever may have to be woken registers the socket it waits on.
"""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from imgsnap.errors import Unavailable


class Cancelled(Unavailable):
    """Nobody wants the answer any more."""

    retryable = False


class Cancellation:
    """A request's way out. Thread safe.

    `deadline` is a time of the monotonic clock: after it nothing is tried again, though a body that
    is still coming in is read to its end.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()

    def check(self) -> None:
        """Raises Cancelled once `cancel` has been called."""
        if self._event.is_set():
            raise Cancelled("the request was given up")

    def cancel(self) -> None:
        """Wakes the request's thread, wherever it waits; its request raises Cancelled."""
        self._event.set()
        with self._lock:
            if self._socket is not None:
                _shut(self._socket)

    def wait(self, seconds: float) -> None:
        """Sleeps. Raises Cancelled when it is woken for that."""
        self._event.wait(seconds)
        self.check()

    def allows(self, seconds: float) -> bool:
        """Whether the deadline is further away than this."""
        return self.deadline is None or time.monotonic() + seconds < self.deadline

    def watch(self, sock: socket.socket | None) -> None:
        """From now on the request waits on this socket, or on none."""
        with self._lock:
            self._socket = sock
            if sock is not None and self._event.is_set():
                _shut(sock)


_current = threading.local()


@contextmanager
def covering(cancellation: Cancellation | None) -> Iterator[None]:
    """Sockets that this thread connects or reuses inside belong to the request."""
    _current.cancellation = cancellation
    try:
        yield
    finally:
        _current.cancellation = None


def watch_current(sock: socket.socket | None) -> None:
    """Tells the request that this thread sends, if it can be cancelled, what it waits on."""
    cancellation: Cancellation | None = getattr(_current, "cancellation", None)
    if cancellation is not None:
        cancellation.watch(sock)


def _shut(sock: socket.socket) -> None:
    # The plain socket's method: ssl's own drops the TLS state under the thread that reads.
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
