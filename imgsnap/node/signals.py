"""Waiting for signals, in processes whose main thread does little else."""

import signal
from collections.abc import Collection


def block(numbers: Collection[int]) -> None:
    """Keeps the signals for `wait`. Call it before any thread exists: threads inherit it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*numbers, signal.SIGALRM})


def wait(numbers: Collection[int], timeout_s: float) -> int | None:
    """The next of the blocked signals; None when none has come within about `timeout_s`.

    By a timer and not by sigtimedwait(2): when a process is stopped (SIGSTOP, the freezer, ^Z)
    until after the deadline, CPython's returns as the signal what lay in memory.
    """
    signal.setitimer(signal.ITIMER_REAL, timeout_s)
    number = signal.sigwait({*numbers, signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, 0)
    if signal.SIGALRM in signal.sigpending():  # it came beside the other one
        signal.sigwait({signal.SIGALRM})
    return None if number == signal.SIGALRM else int(number)
