"""Leases, pins, quota and eviction of the node cache."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.blockstore import cache_quota, write_budget
from imgsnap.blockstore.cache_evict import evict
from imgsnap.blockstore.cache_pins import Pin, boot_id, pin_snapshot, pins, unpin
from imgsnap.blockstore.cache_usage import by_kind, scan, snapshots
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import open_snapshot, read_image_config
from imgsnap.blockstore.write_budget import WriteBudget
from imgsnap.errors import FormatError, InvalidArgument, NotFound, Unavailable
from imgsnap.units import KIB, MIB
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 600


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(BLOCKS, seed=3), extents=3, metadata_blocks=2)


@pytest.fixture(scope="module")
def other():
    return build_snapshot(random_device(BLOCKS, seed=4), extents=2, metadata_blocks=1)


def warm(built, root: Path, **options) -> None:
    with open_store(MemoryRepository(built), root, **options) as store:
        store.reader.warm()
        read_image_config(store.snapshot, store.cache)


def all_of(cache: NodeCache) -> int:
    return sum(entry.bytes for entry in scan(cache))


def test_accounting_is_what_the_file_system_says(built, tmp_path):
    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    root = cache.root
    fixed = [root, *(path for path in root.iterdir() if path.is_dir())]
    own = sum(path.stat().st_blocks for path in fixed) * 512
    du = subprocess.run(["du", "-s", "-B1", root], check=True, capture_output=True, text=True)
    assert all_of(cache) + own == int(du.stdout.split()[0])
    kinds = by_kind(scan(cache))
    assert kinds["extents"] > 0 and kinds["blobs"] > 0 and kinds["packs"] == 0


def test_own_and_shared_bytes_of_snapshots(built, other, tmp_path):
    warm(built, tmp_path)
    warm(other, tmp_path)
    cache = NodeCache(tmp_path)
    one, two = snapshots(cache, scan(cache))
    assert (one.manifest, two.manifest) == (built.digest, other.digest)
    assert one.complete == two.complete == 1.0
    assert not one.in_use and one.holders == ()
    assert one.names == () and two.names[0].endswith(":latest"), "the tag has moved"
    # The image config is the same blob in both.
    assert one.shared == two.shared > 0
    named = sum(e.bytes for e in scan(cache) if e.kind not in ("tags", "quarantine", "tmp"))
    assert one.own + two.own + one.shared == named


def test_an_open_extent_is_not_evicted(built, other, tmp_path):
    warm(other, tmp_path)
    with open_store(MemoryRepository(built), tmp_path) as store:
        store.reader.warm()
        cache = NodeCache(tmp_path)
        result = evict(cache, 0, scan(cache))
        left = {entry.name for entry in scan(cache) if entry.kind == "extents"}
        assert left == {extent.id for extent in built.chunk_map.extents}
        assert result.kept > 0 and result.used > 0
        assert any(item.in_use for item in snapshots(cache, scan(cache))) is False  # no manifest
        assert store.reader.read(0, BLOCKS * 4096) == built.device
        assert store.statistics.misses == 0
    assert evict(cache, 0, scan(cache)).used == 0
    assert list((cache.root / "tmp").iterdir()) == []


def test_a_lease_ends_with_its_process(built, tmp_path):
    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    extent = cache.extent_directory(built.chunk_map.extents[0].id)
    code = (
        "import os, sys\nfrom imgsnap.blockstore import lease\n"
        f"fd = os.open({str(extent / 'data')!r}, os.O_RDWR)\n"
        "assert lease.hold(fd)\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        evict(cache, 0, scan(cache))
        assert [e.path for e in scan(cache) if e.kind == "extents"] == [extent]
        holder.kill()
    evict(cache, 0, scan(cache))
    assert not extent.exists()


def test_an_extent_evicted_while_it_is_opened_is_made_anew(built, tmp_path, monkeypatch):
    """Between opening the files and leasing them."""
    from imgsnap.blockstore import extent_cache, lease

    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    hold, times = lease.hold, []

    def slow(fd: int) -> bool:
        if len(times) < 2:
            times.append(fd)
            evict(cache, 0, scan(cache))
        return hold(fd)

    monkeypatch.setattr(extent_cache.lease, "hold", slow)
    with open_store(MemoryRepository(built), tmp_path) as store:
        assert store.reader.read(0, BLOCKS * 4096) == built.device
        for extent in built.chunk_map.extents:
            assert cache.extent_directory(extent.id).exists()
    monkeypatch.undo()
    with open_store(MemoryRepository(built), tmp_path) as store:
        assert store.reader.local, "what was fetched went to files that have a name"


def test_least_recently_used_goes_first(built, other, tmp_path):
    warm(built, tmp_path)
    warm(other, tmp_path)
    cache = NodeCache(tmp_path)
    for extent in built.chunk_map.extents:
        os.utime(cache.extent_directory(extent.id) / "present", (1e9, 1e9))
    evict(cache, all_of(cache) - 4096, scan(cache))
    names = {entry.name for entry in scan(cache) if entry.kind == "extents"}
    assert names >= {extent.id for extent in other.chunk_map.extents}
    assert len(names & {extent.id for extent in built.chunk_map.extents}) == 2
    with open_store(MemoryRepository(built), tmp_path):
        pass  # a use
    sizes = {e.name: e.bytes for e in scan(cache) if e.kind == "extents"}
    evict(cache, all_of(cache) - max(sizes.values()), scan(cache))
    names = {entry.name for entry in scan(cache) if entry.kind == "extents"}
    assert names & {extent.id for extent in built.chunk_map.extents}


def test_dry_run_changes_nothing(built, tmp_path):
    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    before = {entry.path for entry in scan(cache)}
    told = evict(cache, 0, scan(cache), dry_run=True)
    assert {entry.path for entry in scan(cache)} == before
    done = evict(cache, 0, scan(cache))
    assert {entry.path for entry in told.removed} == {entry.path for entry in done.removed}


def test_one_process_evicts_at_a_time(built, tmp_path):
    from imgsnap.blockstore.cache_pins import maintenance

    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    with maintenance(cache) as ours:
        assert ours
        assert evict(cache, 0, scan(cache)).removed == ()
    assert evict(cache, 0, scan(cache)).removed


def test_what_a_killed_eviction_left_is_removed(built, tmp_path):
    warm(built, tmp_path)
    cache = NodeCache(tmp_path)
    extent = cache.extent_directory(built.chunk_map.extents[0].id)
    extent.rename(cache.root / "tmp/evicted.1.2.3")
    evict(cache, 1 << 40, scan(cache))
    assert list((cache.root / "tmp").iterdir()) == []


# Pins -------------------------------------------------------------------------------------------


def pinned(built, root: Path, holder: str = "me", **options) -> Pin:
    with open_store(MemoryRepository(built), root) as store:
        return pin_snapshot(store.cache, store.snapshot, holder, **options)


def test_a_pinned_snapshot_survives_and_opens_without_its_registry(built, other, tmp_path):
    warm(built, tmp_path)
    warm(other, tmp_path)
    pin = pinned(built, tmp_path)
    cache = NodeCache(tmp_path)
    evict(cache, 0, scan(cache))
    away = MemoryRepository(built)
    away.faults.away = 1
    with open_store(away, tmp_path, built.digest) as store:
        assert store.reader.read(0, BLOCKS * 4096) == built.device
        assert read_image_config(store.snapshot, store.cache) == b'{"config":{}}'
    with pytest.raises(Unavailable):
        gone = MemoryRepository(other)
        gone.faults.away = 1
        open_snapshot(gone, other.digest, cache)
    assert [item.holders for item in snapshots(cache, scan(cache))] == [("me",)]
    unpin(cache, pin.manifest, "me")
    assert evict(cache, 0, scan(cache)).used == 0
    with pytest.raises(NotFound):
        unpin(cache, pin.manifest, "me")


def test_every_holder_has_its_own_pin(built, tmp_path):
    pinned(built, tmp_path, "one")
    pinned(built, tmp_path, "two", labels={"target": "/mnt"})
    cache = NodeCache(tmp_path)
    unpin(cache, built.digest, "one")
    (pin,) = pins(cache).pins
    assert pin.holder == "two" and pin.labels == {"target": "/mnt"}
    for holder in ("", "x" * 300, "a\nb"):
        with pytest.raises(InvalidArgument):
            pinned(built, tmp_path, holder)


def test_pins_of_an_earlier_boot_mean_nothing(built, tmp_path):
    pinned(built, tmp_path, "now", boot=boot_id())
    pinned(built, tmp_path, "then", boot="another")
    cache = NodeCache(tmp_path)
    assert [pin.holder for pin in pins(cache).pins] == ["now"]
    assert len(list((cache.root / "pins").iterdir())) == 1


@given(st.data())
def test_a_damaged_pin_is_reported_and_protects_nothing(built, data):
    names = frozenset()
    raw = bytearray(Pin(built.digest, "me", names).to_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "zero"]))
    if kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[at:]
    else:
        raw[at] = 0
    with pytest.raises(FormatError):
        Pin.parse(bytes(raw))


def test_damaged_pins_do_not_stop_eviction(built, tmp_path):
    warm(built, tmp_path)
    pinned(built, tmp_path)
    cache = NodeCache(tmp_path)
    (path,) = (cache.root / "pins").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    (cache.root / "pins/directory").mkdir()
    found = pins(cache)
    assert found.pins == () and len(found.damaged) == 2
    evict(cache, 0, scan(cache))
    assert {entry.kind for entry in scan(cache)} == {"pins"}


# Quota ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["20GiB", "0", "1.5g", "none"])
def test_the_quota_is_kept(tmp_path, text):
    cache = NodeCache(tmp_path)
    assert cache_quota.kept_quota(cache) == cache_quota.UNLIMITED
    cache_quota.keep_quota(cache, cache_quota.parse_quota(text))
    assert cache_quota.kept_quota(NodeCache(tmp_path)) == cache_quota.parse_quota(text)
    assert cache_quota.quota(NodeCache(tmp_path, quota=5)) == 5


def test_a_damaged_quota_counts_as_none(tmp_path, caplog):
    cache = NodeCache(tmp_path)
    (cache.root / "quota").write_bytes(b"12x\n")
    assert cache_quota.kept_quota(cache) == cache_quota.UNLIMITED
    assert "damaged" in caplog.text
    with pytest.raises(InvalidArgument):
        cache_quota.parse_quota("many")


def test_filling_evicts_what_was_used_before(built, other, tmp_path, monkeypatch):
    monkeypatch.setattr(write_budget, "RETRY_S", 0.0)
    warm(built, tmp_path)
    taken = all_of(NodeCache(tmp_path))
    cache = NodeCache(tmp_path)
    cache_quota.keep_quota(cache, taken + MIB // 2)
    with open_store(MemoryRepository(other), tmp_path) as store:
        shrink(store, 256 * KIB)
        store.reader.warm()
        assert store.reader.read(0, BLOCKS * 4096) == other.device
    assert all_of(cache) <= taken + MIB // 2 + 256 * KIB


def shrink(store, size: int) -> None:
    """A smaller budget, for caches that are smaller than a real one."""
    store.cache.budget._size = store.cache.budget._left = size


def test_a_full_cache_serves_without_storing_and_recovers(built, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(write_budget, "RETRY_S", 0.0)
    cache = NodeCache(tmp_path)
    cache_quota.keep_quota(cache, 400 * KIB)
    repository = MemoryRepository(built)
    with open_store(repository, tmp_path) as store:
        shrink(store, 64 * KIB)
        for _ in range(2):
            assert store.reader.read(0, BLOCKS * 4096) == built.device
        assert store.statistics.unstored > 0
        assert not store.reader.complete
        assert all_of(cache) <= 400 * KIB + 64 * KIB
        assert "serving without storing" in caplog.text
        cache_quota.keep_quota(cache, cache_quota.UNLIMITED)
        for _ in range(500):
            assert store.reader.read(0, BLOCKS * 4096) == built.device
            if store.reader.complete:
                break
            threading.Event().wait(0.02)
        assert store.reader.complete
        assert "stores again" in caplog.text


def test_the_bound_with_several_processes(tmp_path):
    """Each goes over by its budget at most."""
    quota, budget = 2 * MIB, 512 * KIB
    cache_quota.keep_quota(NodeCache(tmp_path), quota)
    code = (
        "import sys, threading\n"
        "from pathlib import Path\n"
        "from imgsnap.blockstore import write_budget\n"
        "from tests.support.block_store import open_store\n"
        "from tests.support.memory_repository import MemoryRepository\n"
        "from tests.support.snapshots import build_snapshot, random_device\n"
        "write_budget.RETRY_S = 0.0\n"
        f"device = random_device({BLOCKS}, seed=int(sys.argv[1]))\n"
        "built = build_snapshot(device, extents=3)\n"
        f"with open_store(MemoryRepository(built), Path({str(tmp_path)!r})) as store:\n"
        f"    store.cache.budget._size = store.cache.budget._left = {budget}\n"
        "    for _ in range(3):\n"
        "        assert store.reader.read(0, len(device)) == device\n"
        "    print('read', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(100 + seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == "read\n"
        # All extents are in use now: nothing of them can have been evicted.
        assert all_of(NodeCache(tmp_path)) <= quota + len(processes) * budget
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]


def test_a_budget_without_a_quota_is_refilled():
    budget = WriteBudget(lambda: None, size=100)
    assert all(budget.take(10) for _ in range(100))
    assert budget.storing


def test_a_look_that_fails_changes_nothing(caplog):
    def broken() -> int:
        raise ValueError

    budget = WriteBudget(broken, size=100)
    assert all(budget.take(40) for _ in range(10))
    assert "failed" in caplog.text
