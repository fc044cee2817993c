"""Killed at every step, and cut off from power: what the next process finds.

A killed process leaves what it had written in the page cache. A power cut may lose any page that
was not synced while keeping others, and nothing here is synced before it is used: presence bytes
may be there without their data. Readers verify on first use in a process, so neither shows.
"""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgsnap.blockstore.cache_check import DAMAGED, check_cache
from imgsnap.blockstore.cache_evict import evict
from imgsnap.blockstore.cache_usage import scan, snapshots
from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.errors import ImgsnapError
from tests.support import crash_steps
from tests.support.block_store import open_store
from tests.support.cli import REPOSITORY
from tests.support.memory_repository import MemoryRepository

SIZE = crash_steps.BLOCKS * 4096


@pytest.fixture(scope="module")
def built():
    return crash_steps.built()


def prepare(scenario, start):
    start.mkdir()
    if scenario == "fill":
        return
    crash_steps.fill(start)
    if scenario == "evict":
        for path in (start / "v1/pins").iterdir():
            path.unlink()
    if scenario in ("repair", "refill"):
        for pattern in ("extents/*/data", "metadata/*", "blobs/*", "chunk-maps/*", "tags/*"):
            path = sorted(start.glob(f"v1/{pattern}"))[0]
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)


@pytest.mark.parametrize("scenario", list(crash_steps.SCENARIOS))
def test_killed_at_every_step(built, tmp_path, scenario):
    prepare(scenario, tmp_path / "start")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_steps", scenario, tmp_path],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    steps = int(ran.stdout)
    assert steps >= {"fill": 40, "evict": 15, "repair": 8, "refill": 15}[scenario]
    for number in range(steps + 1):
        root = tmp_path / str(number)
        cache = NodeCache(root)
        found = [item for item in check_cache(cache).findings if item.state == DAMAGED]
        if scenario in ("fill", "evict"):
            assert found == [], f"after step {number}"
            no_byte_without_its_data(built, cache)
        snapshots(cache, scan(cache))
        away = MemoryRepository(built)
        away.faults.away = 1
        reads_right_or_fails(built, away, root)
        with open_store(MemoryRepository(built), root) as store:
            assert store.reader.read(0, SIZE) == built.device, f"after step {number}"
        evict(cache, 0, scan(cache))
        leftovers = {entry.kind for entry in scan(cache)} - {"pins", "tmp", "quarantine"}
        assert not leftovers or list((cache.root / "pins").iterdir())


def no_byte_without_its_data(built, cache):
    for extent in built.chunk_map.extents:
        directory = cache.extent_directory(extent.id)
        if not directory.exists():
            continue
        known = (directory / "present").read_bytes()[PresenceHeader.SIZE :]
        data = (directory / "data").read_bytes()
        at = 0
        config = next(item for item in built.config.extents if item.extent_id == extent.id)
        device = built.device[config.base_block * 4096 :]
        for blocks, here in zip(extent.blocks, known, strict=True):
            if here:
                assert data[at : at + blocks * 4096] == device[at : at + blocks * 4096]
            at += blocks * 4096


def reads_right_or_fails(built, repository, root):
    try:
        with open_store(repository, root, built.digest, deadline_s=5) as store:
            for offset in range(0, SIZE, 16384):
                try:
                    data = store.reader.read(offset, 16384)
                except ImgsnapError:
                    continue
                assert data == built.device[offset : offset + 16384]
    except ImgsnapError:
        return


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_power_cut_loses_any_pages(built, tmp_path_factory, data):
    """Names and lengths survive (metadata is journalled), pages of data do or do not."""
    root = tmp_path_factory.mktemp("power")
    crash_steps.fill(root)
    for path in sorted(root.glob("v1/**/*")):
        if path.is_dir() or path.parent.name == "pins":
            continue  # a pin's record is synced before anybody relies on it
        raw = bytearray(path.read_bytes())
        kept = data.draw(st.sampled_from(["all", "none", "some", "empty"]))
        if path.name == "present":
            kept = "all"  # the worst case: it says that everything is here
        if kept == "empty" and path.name != "data":
            raw = bytearray()
        elif kept in ("none", "some"):
            for at in range(0, len(raw), 4096):
                if kept == "none" or data.draw(st.booleans()):
                    raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
        path.write_bytes(raw)
    away = MemoryRepository(built)
    away.faults.away = 1
    reads_right_or_fails(built, away, root)
    with open_store(MemoryRepository(built), root) as store:
        assert store.reader.read(0, SIZE) == built.device
    with open_store(away, root, built.digest) as store:
        assert store.reader.read(0, SIZE) == built.device, "it has healed"
