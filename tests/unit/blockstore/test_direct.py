"""A complete snapshot as local files: verified first, mounted by the kernel without a server."""

import os
import subprocess
from contextlib import closing, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.blockstore import direct
from imgsnap.blockstore.cache_check import check_cache
from imgsnap.blockstore.cache_evict import evict
from imgsnap.blockstore.cache_usage import by_kind, scan, snapshots
from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.blockstore.direct import MARKER, VerifiedMarker, open_direct
from imgsnap.blockstore.materialise import materialise
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.convert.limits import Limits
from imgsnap.convert.pipeline import Options
from imgsnap.convert.progress import Silent
from imgsnap.convert.publish import publish
from imgsnap.convert.source import select_images
from imgsnap.errors import FormatError, LimitExceeded
from imgsnap.formats import erofs
from imgsnap.formats.erofs_devices import DeviceSlot, with_devices
from imgsnap.mount import linux
from imgsnap.oci.layout import LayoutRepository
from tests.support.block_store import open_store
from tests.support.image_builder import image, write_layout
from tests.support.memory_repository import MemoryRepository
from tests.support.samples import base_tar, program_tar, top_tar
from tests.support.snapshots import build_snapshot, erofs_image, make_tree

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree") / "root")


@pytest.fixture(scope="module")
def built(tree, tmp_path_factory):
    device = erofs_image(tree, tmp_path_factory.mktemp("image") / "image.erofs")
    return build_snapshot(device, extents=3, metadata_blocks=12)


@contextmanager
def opened(built, root, *, warm=True):
    with open_store(MemoryRepository(built), root) as store:
        if warm:
            store.reader.warm()
        yield store


def listing(root):
    return subprocess.run(
        ["tar", "--sort=name", "--mtime=@0", "-cf", "-", "-C", root, "."],
        check=True,
        capture_output=True,
    ).stdout


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A snapshot of our own writer, whose metadata is all in its region; its layout."""
    root = tmp_path_factory.mktemp("converted")
    write_layout(root / "source", image(base_tar(), top_tar(), program_tar()))
    source = LayoutRepository(root / "source")
    images = select_images(source, "latest", [], Limits())
    with (
        closing(LayoutRepository(root / "target", create=True)) as target,
        ChunkIndex(root / "index") as index,
    ):
        options = Options(work_dir=root / "work", jobs=1)
        publish(source, images, target, "latest", index, options, Silent())
    return root / "target"


@contextmanager
def mounted(source, target, options=""):
    target.mkdir()
    linux.mount(str(source), target, "erofs", linux.MountFlag.RDONLY, options)
    try:
        yield target
    finally:
        linux.umount(target)


@needs_root
def test_the_kernel_reads_the_extents_themselves(converted, tmp_path):
    with open_store(LayoutRepository(converted), tmp_path / "cache") as store:
        materialise(store.snapshot, tmp_path / "flat")
        store.reader.warm()
        device = open_direct(store.snapshot, store.cache)
        cache, size = store.cache, store.reader.size
    assert device is not None and len(device.devices) == 3
    with (
        mounted(tmp_path / "flat", tmp_path / "one") as flat,
        mounted(device.metadata, tmp_path / "two", device.mount_options) as plain,
    ):
        device.close()
        assert evict(cache, 0, scan(cache)).used == 0  # names may go: the kernel has the files
        assert len(listing(flat)) > 300_000
        assert listing(plain) == listing(flat)
        total = os.statvfs(plain)
        assert total.f_blocks * total.f_frsize == size


def test_an_independent_judge_accepts_the_device_table(converted, tmp_path):
    """The tree and the superblock; erofs-utils 1.5 finds no data by the table's addresses."""
    with open_store(LayoutRepository(converted), tmp_path / "cache") as store:
        store.reader.warm()
        with open_direct(store.snapshot, store.cache) as device:
            devices = [f"--device=/proc/self/fd/{fd}" for fd in device.devices]
            judged = ["fsck.erofs", *devices, device.metadata]
            done = subprocess.run(judged, pass_fds=device.devices, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            changed = bytearray(device.metadata.read_bytes())
            changed[1024 + 86] ^= 1  # the number of devices
            (tmp_path / "wrong").write_bytes(changed)
            judged = ["fsck.erofs", *devices, tmp_path / "wrong"]
            done = subprocess.run(judged, pass_fds=device.devices, capture_output=True)
            assert done.returncode != 0


def test_what_is_not_complete_is_not_direct(built, tmp_path):
    with opened(built, tmp_path, warm=False) as store:
        assert open_direct(store.snapshot, store.cache) is None
        store.reader.read(0, len(built.device) // 2)
        assert open_direct(store.snapshot, store.cache) is None
        store.reader.warm()
        with open_direct(store.snapshot, store.cache) as device:
            assert len(device.devices) == 3


def test_every_chunk_is_hashed_once(built, tmp_path, monkeypatch):
    with opened(built, tmp_path) as store:
        hashed = []
        missing = direct.ExtentCache.missing
        monkeypatch.setattr(
            direct.ExtentCache,
            "missing",
            lambda self, rows: hashed.append(self.id) or missing(self, rows),
        )
        for _ in range(3):
            open_direct(store.snapshot, store.cache).close()
        assert sorted(hashed) == sorted(extent.id for extent in built.chunk_map.extents)


@pytest.mark.parametrize("marked", [False, True])
def test_damage_is_found_before_the_kernel_sees_it(built, tmp_path, marked):
    with opened(built, tmp_path) as store:
        if marked:
            open_direct(store.snapshot, store.cache).close()
    extent = built.chunk_map.extents[1]
    path = tmp_path / "v1/extents" / extent.id / "data"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"damage")
    with opened(built, tmp_path, warm=False) as store:
        assert open_direct(store.snapshot, store.cache) is None
        store.reader.warm()
        with open_direct(store.snapshot, store.cache) as device:
            size = path.stat().st_size
            base = next(e.base_block for e in built.config.extents if e.extent_id == extent.id)
            assert (
                os.pread(device.devices[1], size, 0)
                == (built.device[base * 4096 : base * 4096 + size])
            )


def test_a_write_that_keeps_size_and_mtime_is_noticed(built, tmp_path):
    """ctime cannot be set back."""
    with opened(built, tmp_path) as store:
        open_direct(store.snapshot, store.cache).close()
    path = tmp_path / "v1/extents" / built.chunk_map.extents[0].id / "data"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"damage")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with opened(built, tmp_path, warm=False) as store:
        assert open_direct(store.snapshot, store.cache) is None


def test_damage_of_what_direct_made(built, tmp_path):
    with opened(built, tmp_path) as store:
        with open_direct(store.snapshot, store.cache) as device:
            made, content = device.metadata, device.metadata.read_bytes()
        changed = bytearray(content)
        changed[5000] ^= 1
        made.write_bytes(changed)
        assert [item.kind for item in check_cache(store.cache).findings] == ["direct"]
        with open_direct(store.snapshot, store.cache) as device:
            assert device.metadata.read_bytes() == content
        for extent in built.chunk_map.extents:
            marker = store.cache.extent_directory(extent.id) / MARKER
            marker.write_bytes(marker.read_bytes()[:-1])
        open_direct(store.snapshot, store.cache).close()


@given(st.binary(max_size=200))
def test_markers_are_parsed_strictly(raw):
    try:
        marker = VerifiedMarker.parse(raw)
    except FormatError:
        return
    assert marker.pack() == raw


def test_it_is_leased_counted_and_evicted(built, tmp_path):
    cache = NodeCache(tmp_path)
    with opened(built, tmp_path) as store:
        device = open_direct(store.snapshot, store.cache)
    with device:
        evict(cache, 0, scan(cache))
        kinds = {kind for kind, size in by_kind(scan(cache)).items() if size}
        assert kinds == {"extents", "direct"}
    with opened(built, tmp_path) as store:
        open_direct(store.snapshot, store.cache).close()
    (found,) = snapshots(cache, scan(cache))
    assert found.own == sum(e.bytes for e in scan(cache) if e.kind != "tags")
    assert evict(cache, 0, scan(cache)).used == 0


def test_limits_of_the_device_table(built):
    region = built.device[: 12 * 4096]
    made = with_devices(region, [DeviceSlot(b"a", 5, 12), DeviceSlot(b"b", 6, 17)])
    assert made[4096 : len(region)] == region[4096:] and len(made) == len(region) + 256
    super_block = erofs.Superblock._make(erofs.SUPERBLOCK.unpack_from(made, erofs.SUPER_OFFSET))
    assert super_block.extra_devices == 2 and super_block.device_slot * 128 == len(region)
    assert super_block.checksum == erofs.superblock_checksum(made[:4096])
    with pytest.raises(LimitExceeded):
        with_devices(region + bytes(9 << 20), [])
    with pytest.raises(LimitExceeded):
        with_devices(region, [DeviceSlot(b"a", 1, 1)] * 1025)
    with pytest.raises(FormatError):
        with_devices(bytes(8192), [])
