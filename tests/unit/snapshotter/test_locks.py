"""Locks by key."""

import threading
from concurrent.futures import ThreadPoolExecutor

from imgsnap.snapshotter.locks import KeyedLocks


def test_one_holds_a_key_at_a_time():
    locks, inside, most = KeyedLocks(), 0, 0
    start = threading.Barrier(8)

    def work(_: int) -> None:
        nonlocal inside, most
        start.wait()
        for _ in range(50):
            with locks.hold("key"):
                inside += 1
                most = max(most, inside)
                inside -= 1

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert most == 1
    assert locks._locks == {}, "nothing is kept of keys that nobody wants"


def test_other_keys_are_free():
    locks = KeyedLocks()
    with locks.hold("a"), locks.hold("b"), locks.attempt("a") as again, locks.attempt("c") as other:
        assert (again, other) == (False, True)
    with locks.attempt("a") as mine:
        assert mine
    assert locks._locks == {}
