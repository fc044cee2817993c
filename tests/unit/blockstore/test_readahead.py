"""Streams of reads: which are sequential, and how far ahead is asked for."""

import random
from itertools import pairwise

from imgsnap.blockstore.readahead import (
    STREAMS_MAX,
    WINDOW_FIRST,
    WINDOWS_SCAN,
    Readahead,
)
from imgsnap.units import GIB, KIB, MIB


def asked(readahead, reads):
    return [found for offset, length in reads if (found := readahead.after(offset, length))]


def test_a_sequential_reader_is_always_ahead_and_nothing_is_asked_twice():
    step = 128 * KIB
    found = asked(Readahead(GIB), [(at, step) for at in range(0, 64 * MIB, step)])
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert found[0][1] - found[0][0] == WINDOW_FIRST
    assert max(end - start for start, end in found) <= 8 * MIB
    assert found[-1][1] - 64 * MIB >= 4 * MIB - step


def test_random_reads_ask_for_one_window_each():
    rng = random.Random(4)
    reads = [(rng.randrange(0, GIB, 4096), 4096) for _ in range(2000)]
    found = asked(Readahead(GIB), reads)
    larger = [(start, end) for start, end in found if end - start > WINDOW_FIRST]
    assert len(larger) < 30
    assert all(Readahead(GIB, 0).after(offset, length) is None for offset, length in reads)


def test_a_new_place_gets_a_larger_window_when_much_has_been_read():
    readahead = Readahead(GIB)
    readahead.brought(WINDOWS_SCAN[0][0] / 2)
    assert readahead.after(0, 4096) == (4096, 4096 + WINDOW_FIRST)
    for number, (share, window) in enumerate(WINDOWS_SCAN, 1):
        readahead.brought(share)
        at = number * GIB // 4
        assert readahead.after(at, 4096) == (at + 4096, at + 4096 + window)
    small = Readahead(GIB, MIB)
    small.brought(1.0)
    assert small.after(0, 4096) == (4096, 4096 + MIB)


def test_interleaved_streams_are_told_apart():
    step = 64 * KIB
    reads = [
        (base + at, step) for at in range(0, 4 * MIB, step) for base in range(0, GIB, GIB // 8)
    ]
    found = asked(Readahead(GIB), reads)
    for base in range(0, GIB, GIB // 8):
        assert any(base + 4 * MIB < end <= base + 14 * MIB for _, end in found)


def test_requests_answered_out_of_order_stay_one_stream():
    step = MIB
    reads = [(at ^ step, step) for at in range(0, 32 * MIB, step)]
    assert len(asked(Readahead(GIB), reads)) >= 3


def test_the_end_of_the_device_and_forgotten_streams():
    readahead = Readahead(MIB)
    found = asked(readahead, [(at, 64 * KIB) for at in range(0, MIB, 64 * KIB)])
    assert found[-1][1] == MIB
    for number in range(STREAMS_MAX * 2):
        readahead.after(number * 10 * MIB, 1)
    assert len(readahead._streams) == STREAMS_MAX
