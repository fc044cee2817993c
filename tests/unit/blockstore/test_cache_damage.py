"""The cache never lies: any damage to any file of it, then another process.

A reader gets the right bytes (fetched again), or an error when the registry is away, and
`cache check` finds what is damaged before it is used.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgsnap.blockstore.cache_check import DAMAGED, UNVERIFIABLE, check_cache
from imgsnap.blockstore.cache_pins import pin_snapshot
from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import QUARANTINE_MAX, NodeCache, allocated
from imgsnap.errors import ImgsnapError
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, random_device

BLOCKS = 420
SIZE = BLOCKS * 4096
FILES = ("extents/*/data", "extents/*/present", "metadata/*", "chunk-maps/*", "blobs/*", "tags/*")
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(BLOCKS, seed=21), extents=2, metadata_blocks=3)


@pytest.fixture(scope="module")
def other():
    return build_snapshot(random_device(BLOCKS, seed=22), extents=2, metadata_blocks=3)


@pytest.fixture(scope="module")
def filled(built, other, tmp_path_factory):
    """A cache with two snapshots that have equally long parts."""
    root = tmp_path_factory.mktemp("filled")
    for snapshot, name in ((built, "one"), (other, "two")):
        repository = MemoryRepository(snapshot)
        repository.manifests[name] = snapshot.manifest
        with open_store(repository, root, name) as store:
            store.reader.warm()
            pin_snapshot(store.cache, store.snapshot, "test")
    return root


def copy_of(filled: Path, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("copy") / "cache"
    shutil.copytree(filled, root)
    return root


def read_all(snapshot, root: Path, *, away: bool = False, reference: str = "one") -> bytes:
    repository = MemoryRepository(snapshot)
    repository.manifests[reference] = snapshot.manifest
    repository.faults.away = int(away)
    with open_store(repository, root, reference, deadline_s=5) as store:
        return store.reader.read(0, SIZE)


def checked(snapshot, root: Path) -> None:
    """What every damage must lead to, in the order that finds most: away, there, away again."""
    with contextlib.suppress(ImgsnapError):
        assert read_all(snapshot, root, away=True) == snapshot.device
    assert read_all(snapshot, root) == snapshot.device
    assert read_all(snapshot, root, away=True) == snapshot.device, "it has healed"


@EXAMPLES
@given(data=st.data())
def test_any_damage_to_any_file(built, filled, tmp_path_factory, data):
    root = copy_of(filled, tmp_path_factory)
    pattern = data.draw(st.sampled_from(FILES))
    path = data.draw(st.sampled_from(sorted(root.glob(f"v1/{pattern}"))))
    raw = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "truncate", "zero", "grow", "ones"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    if kind == "flip":
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "truncate":
        del changed[at:]
    elif kind == "grow":
        changed += data.draw(st.binary(min_size=1, max_size=100))
    else:
        length = data.draw(st.integers(1, 100_000))
        value = b"\0" if kind == "zero" else b"\1"
        changed[at : at + length] = value * len(changed[at : at + length])
    path.write_bytes(changed)
    if changed != raw and not harmless(path, raw, changed):
        findings = check_cache(NodeCache(root)).findings
        # Extents whose map is damaged are unverifiable.
        found = {(item.kind, item.name) for item in findings if item.state == DAMAGED}
        name = path.parent if path.name in ("data", "present") else path
        assert found == {(name.parent.name, name.name)}
    checked(built, root)
    shutil.rmtree(root)


def harmless(path: Path, raw: bytes, changed: bytes) -> bool:
    """Damage that only makes chunks absent, or that hits bytes which nobody looks at."""
    if path.name == "data":
        return len(raw) == len(changed)  # told apart by the tests of extents below
    if path.name == "present":
        head = PresenceHeader.SIZE
        return len(raw) == len(changed) and raw[:head] == changed[:head]
    return False


@EXAMPLES
@given(data=st.data())
def test_check_finds_any_flipped_bit_of_a_present_chunk(built, filled, tmp_path_factory, data):
    root = copy_of(filled, tmp_path_factory)
    extent = data.draw(st.sampled_from(built.chunk_map.extents))
    path = root / "v1/extents" / extent.id / "data"
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    cache = NodeCache(root)
    (finding,) = check_cache(cache).findings
    assert finding.name == extent.id and len(finding.rows) == 1
    assert check_cache(cache, repair=True).findings == (finding,)
    assert check_cache(cache).findings == ()
    assert read_all(built, root) == built.device
    shutil.rmtree(root)


@pytest.mark.parametrize("pattern", [*FILES, "extents/*"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "unreadable"])
def test_something_else_in_a_files_place(built, filled, tmp_path_factory, pattern, kind):
    root = copy_of(filled, tmp_path_factory)
    for path in sorted(root.glob(f"v1/{pattern}")):
        saved = path.with_name(path.name + ".saved")
        if kind == "unreadable":
            path.chmod(0)  # root reads it all the same
            continue
        path.rename(saved)
        if kind == "directory":
            (path / "inside").mkdir(parents=True)
        elif path.parent.name in ("extents",) or path.parent.parent.name == "extents":
            os.mkfifo(path)
        else:
            path.mkdir()  # a named pipe would be waited for; only root could put one there
        if saved.is_dir():
            shutil.rmtree(saved)
        else:
            saved.unlink()
    checked(built, root)


@pytest.mark.parametrize("pattern", FILES)
def test_swapped_files(built, other, filled, tmp_path_factory, pattern):
    """Every file in the place of its neighbour, each of them whole."""
    root = copy_of(filled, tmp_path_factory)
    paths = sorted(root.glob(f"v1/{pattern}"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    findings = check_cache(NodeCache(root)).findings
    assert len(findings) >= min(2, len(paths))
    checked(built, root)
    checked_two = read_all(other, root, reference="two")
    assert checked_two == other.device


@pytest.mark.parametrize("old", ["present", "data"])
def test_files_of_different_times(built, filled, tmp_path_factory, old):
    """A map that says everything is here beside a data file without it, and the reverse."""
    root = copy_of(filled, tmp_path_factory)
    for extent in built.chunk_map.extents:
        directory = root / "v1/extents" / extent.id
        if old == "present":
            size = (directory / "data").stat().st_size
            os.truncate(directory / "data", 0)
            os.truncate(directory / "data", size)
        else:
            raw = bytearray((directory / "present").read_bytes())
            raw[PresenceHeader.SIZE :] = bytes(len(raw) - PresenceHeader.SIZE)
            (directory / "present").write_bytes(raw)
    findings = check_cache(NodeCache(root)).findings
    assert len(findings) == (2 if old == "present" else 0)
    checked(built, root)


def test_a_damaged_pack(built, tmp_path):
    """Packs are cached for servers without ranges only."""
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, SIZE) == built.device
    shutil.rmtree(tmp_path / "v1/extents")
    cache = NodeCache(tmp_path)
    packs = list((cache.root / "packs").iterdir())
    for path in packs:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 4
        path.write_bytes(raw)
    assert {item.name for item in check_cache(cache).findings} == {path.name for path in packs}
    repository = MemoryRepository(built)
    repository.faults.no_ranges = 1
    with open_store(repository, tmp_path) as store:
        assert store.reader.read(0, SIZE) == built.device


def test_a_tag_never_names_another_snapshot(built, other, filled, tmp_path_factory):
    """A tag's record that somebody wrote by hand is not believed."""
    root = copy_of(filled, tmp_path_factory)
    for path in root.glob("v1/tags/*"):
        path.write_bytes(json.dumps({"digest": other.digest, "name": "x"}).encode())
    with pytest.raises(ImgsnapError):
        read_all(built, root, away=True)


def test_an_extent_without_a_map_is_unverifiable(filled, tmp_path_factory):
    root = copy_of(filled, tmp_path_factory)
    cache = NodeCache(root)
    shutil.rmtree(cache.root / "chunk-maps")
    (cache.root / "chunk-maps").mkdir()
    findings = check_cache(cache, repair=True).findings
    assert {item.state for item in findings} == {UNVERIFIABLE} and len(findings) == 4
    assert list((cache.root / "extents").iterdir()) == []
    assert check_cache(cache).findings == ()


def test_quarantine_is_bounded(tmp_path, monkeypatch):
    from imgsnap.blockstore import node_cache

    assert QUARANTINE_MAX > 0
    monkeypatch.setattr(node_cache, "QUARANTINE_MAX", 100_000)
    cache = NodeCache(tmp_path)
    for number in range(10):
        path = cache.root / "blobs" / f"{number:064}"
        path.write_bytes(bytes(30_000))
        cache.quarantine(path, "a test")
        assert not path.exists()
    place = cache.root / "quarantine"
    assert sum(map(allocated, place.iterdir())) <= 100_000
    newest = max(path.name for path in place.iterdir())
    assert f"{9:064}" in newest
