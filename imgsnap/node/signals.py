"""Waiting for signals, in processes whose main thread does little else."""

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager


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


@contextmanager
def catch(numbers: Collection[int]) -> Iterator[Callable[[], int]]:
    """Catches the signals in the block, and blocks none, which programs we start would inherit.
    What it gives returns the next one that has come since, however long that takes.

    To be called in the main thread. By a pipe and not by an Event that a handler sets: a thread
    that is just starting can be given a signal before the main thread has woken up for it, and
    CPython runs handlers in the main thread only, which would go on waiting.
    """
    with ExitStack() as stack:
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        os.set_blocking(writer, False)
        # its C part runs in any thread, and writes the signal's number
        stack.callback(
            signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        )
        for number in numbers:  # without a handler in Python there is no number
            stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))

        def following() -> int:
            while (number := os.read(reader, 1)[0]) not in numbers:
                pass
            return number

        yield following
