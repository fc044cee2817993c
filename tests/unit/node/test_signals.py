"""Processes that are stopped and go on with a signal or none; signals that a thread is given."""

import os
import signal
import subprocess
import sys
import time

import pytest

WAITER = """
import signal, sys
from imgsnap.node import signals
signals.block({signal.SIGTERM})
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    print(signals.wait({signal.SIGTERM}, float(sys.argv[1])), flush=True)
"""


@pytest.fixture
def waiter():
    """Starts a process that waits a number of times, each with a timeout, and prints what came."""
    started: list[subprocess.Popen] = []

    def start(timeout_s: float, times: int) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITER, str(timeout_s), str(times)],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def stop(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    while state(process.pid) != "T":
        time.sleep(0.001)


def test_a_process_that_was_stopped_beyond_its_deadline_got_no_signal(waiter):
    process = waiter(0.2, 1)
    stop(process)
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=20)[0] == "None\n"


def test_a_signal_that_came_while_stopped_is_not_lost(waiter):
    process = waiter(0.2, 4)  # the timer may be reported first, and once before the stop
    stop(process)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.4)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=20)[0].split().count("15") == 1


def test_a_signal_ends_the_wait(waiter):
    process = waiter(1000, 1)
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "15\n"


def test_without_a_signal_the_wait_ends(waiter):
    assert waiter(0.05, 2).communicate(timeout=20)[0] == "None\nNone\n"


CATCHER = """
import signal, sys, threading
from imgsnap.node import signals
other = threading.Thread(target=threading.Event().wait, daemon=True)
other.start()
before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
with signals.catch({signal.SIGTERM, signal.SIGINT}) as next_signal:
    if sys.argv[1] == "other":
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_kill(other.ident, signal.SIGUSR1)
        signal.pthread_kill(other.ident, signal.SIGTERM)
    print("ready", flush=True)
    print(next_signal())
assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
assert signal.set_wakeup_fd(-1) == -1
"""


def catch(who: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CATCHER, who], stdout=subprocess.PIPE, text=True)


def test_a_signal_that_another_thread_was_given_ends_the_wait():
    with catch("other") as process:
        try:
            assert process.communicate(timeout=20)[0] == "ready\n15\n"
            assert process.returncode == 0
        finally:
            process.kill()


def test_a_caught_signal_ends_the_wait():
    with catch("main") as process:
        try:
            assert process.stdout.readline() == "ready\n"
            os.kill(process.pid, signal.SIGINT)
            assert process.communicate(timeout=20)[0] == "2\n"
        finally:
            process.kill()
