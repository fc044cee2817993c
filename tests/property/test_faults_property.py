"""Random reads through a registry that fails at random: right bytes or one of our errors."""

import shutil
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgsnap.errors import ImgsnapError
from imgsnap.units import KIB
from tests.support.faulty_store import (
    DEADLINE_S,
    faulty_store,
    open_files,
    publish,
    settled,
)
from tests.support.registry import FAULTS, ScriptedRegistry
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 600
SIZE = BLOCKS * 4096

reads = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, 300 * KIB)), min_size=1, max_size=6
)
faults = st.lists(st.sampled_from(["", *FAULTS]), max_size=24)


@cache
def snapshot():
    return build_snapshot(random_device(BLOCKS), extents=2, packs=2)


def check(
    plan: list[str],
    rounds: list[list[tuple[int, int]]],
    *,
    auth: bool,
    redirects: bool,
    readahead: bool,
) -> None:
    """Reads each round's ranges at once, from threads, while the faults of `plan` last."""
    built = snapshot()
    files, threads = open_files(), threading.active_count()
    directory = Path(tempfile.mkdtemp(prefix="imgsnap-faults-"))
    try:
        with ScriptedRegistry() as registry:
            publish(registry, built)
            registry.switches.auth = "token" if auth else ""
            registry.switches.redirect_blobs = redirects
            with faulty_store(registry, directory) as store:
                device = store.open(readahead_max=256 * KIB if readahead else 0)
                registry.faults.extend(plan)
                for wanted in rounds:
                    _read_at_once(device.reader, built, wanted)
                registry.faults.clear()
                assert _patient(device.reader.read, 0, SIZE) == built.device
        assert settled(threading.active_count, threads) <= threads
        assert settled(open_files, files) <= files
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _read_at_once(reader, built, wanted: list[tuple[int, int]]) -> None:
    problems = []

    def read(offset: int, length: int) -> None:
        started = time.monotonic()
        try:
            data = reader.read(offset, length)
        except ImgsnapError:
            pass
        except BaseException as error:
            problems.append(error)
        else:
            if data != built.device[offset : offset + length]:
                problems.append(f"wrong bytes at {offset}+{length}")
        # Not a measurement: four deadlines are a hang.
        if time.monotonic() - started > 4 * DEADLINE_S:
            problems.append(f"{offset}+{length} hung")

    threads = [threading.Thread(target=read, args=one) for one in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def _patient(read, offset: int, length: int) -> bytes:
    """What is still failing from before may fail one read more."""
    for _ in range(5):
        try:
            return read(offset, length)
        except ImgsnapError:
            time.sleep(0.1)
    return read(offset, length)


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
@given(
    plan=faults,
    rounds=st.lists(reads, min_size=1, max_size=3),
    auth=st.booleans(),
    redirects=st.booleans(),
    readahead=st.booleans(),
)
def test_every_read_is_right_or_an_error(plan, rounds, auth, redirects, readahead):
    check(plan, rounds, auth=auth, redirects=redirects, readahead=readahead)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("redirects", [False, True])
def test_one_fault_of_each_kind_is_survived(tmp_path, fault, redirects):
    """A single fault costs a retry, never a read."""
    built = snapshot()
    with ScriptedRegistry() as registry:
        publish(registry, built)
        registry.switches.auth = "token"
        registry.switches.redirect_blobs = redirects
        with faulty_store(registry, tmp_path) as store:
            device = store.open()
            registry.faults.append(fault)
            assert device.reader.read(5000, 300_000) == built.device[5000:305_000]
            assert not registry.faults
            assert device.reader.read(0, SIZE) == built.device
