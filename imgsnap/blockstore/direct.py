"""Complete means direct: a snapshot whose bytes are all local, as plain files for the kernel.

EROFS mounts a small file with the metadata and a device table, and takes file data straight from
the extents' cache files (formats/erofs_devices.py). No process serves the mount, nothing is copied,
and snapshots that share a layer share its pages.

Nothing is verified on read then, so everything is verified before: each chunk is hashed, the data
is synced, and a marker beside it keeps what stat(2) said of the file that was hashed. While size,
inode, mtime and ctime are those of the marker nobody has written to the file since, and later
mounts trust it. What changes below the file system afterwards, on the medium itself, is out of
reach until `imgsnap cache check` hashes the file again; that holds for every file on the disk.
"""

import logging
import os
import struct
import time
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

from imgsnap.blockstore.extent_cache import ExtentCache, ExtentPool
from imgsnap.blockstore.node_cache import NodeCache, sealed_intact
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.digest import digest_hex
from imgsnap.errors import FormatError, ImgsnapError, LimitExceeded
from imgsnap.formats.erofs_devices import DEVICE_SLOT, DeviceSlot, with_devices

RECORD = "verified marker"
MARKER = "verified"
"""The marker's name in an extent's directory."""
MOUNT_OPTIONS_MAX = 4095
"""Bytes of mount(2)'s options: a page with its NUL."""
_RACY_NS = 20_000_000
"""Two writes closer to each other than the kernel's clock ticks may have one ctime."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VerifiedMarker:
    """offset size type name: 0 8 magic · 8 2 u16 version · 10 6 reserved · 16 8 u64 device ·
    24 8 u64 inode · 32 8 u64 size · 40 8 u64 mtime_ns · 48 8 u64 ctime_ns · 56 32 extent id ·
    88 4 reserved · 92 4 u32 CRC-32 of bytes 0 to 91."""

    MAGIC: ClassVar[bytes] = b"IMGSNPVF"
    VERSION: ClassVar[int] = 1
    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sH6xQQQQQ32s4xI")
    SIZE: ClassVar[int] = 96

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int
    ctime_ns: int
    extent_id: str

    @classmethod
    def of(cls, fd: int, extent_id: str) -> Self:
        """What stat(2) says of an open file now."""
        status = os.fstat(fd)
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            extent_id,
        )

    def pack(self) -> bytes:
        raw = self.STRUCT.pack(
            self.MAGIC,
            self.VERSION,
            self.device,
            self.inode,
            self.size,
            self.mtime_ns,
            self.ctime_ns,
            bytes.fromhex(self.extent_id),
            0,
        )[:-4]
        return raw + zlib.crc32(raw).to_bytes(4, "little")

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """Raises FormatError."""
        if len(raw) != cls.SIZE:
            raise FormatError(RECORD, "record", 0, f"{len(raw)} bytes, not {cls.SIZE}")
        magic, version, device, inode, size, mtime, ctime, extent, crc = cls.STRUCT.unpack(raw)
        if magic != cls.MAGIC or version != cls.VERSION:
            raise FormatError(RECORD, "magic", 0, f"{magic!r} version {version}")
        if crc != zlib.crc32(raw[:-4]):
            raise FormatError(RECORD, "crc", cls.SIZE - 4, "does not match the record")
        return cls(device, inode, size, mtime, ctime, extent.hex())


assert VerifiedMarker.STRUCT.size == VerifiedMarker.SIZE


class DirectDevice:
    """The files of a complete snapshot, verified and leased until it is closed.

    The kernel opens them anew when it mounts, and needs no lease; but eviction does not see what
    the kernel has open, so a mount that outlives this object is kept by a pin (cache_pins.py).
    """

    def __init__(self, metadata: Path, devices: tuple[int, ...], held: ExitStack) -> None:
        self.metadata = metadata
        """What to mount."""
        self.devices = devices
        """Descriptors of the extents' data, in the order of the device table."""
        self._held = held

    @property
    def mount_options(self) -> str:
        """EROFS's own, for mount(2) called in this process."""
        return ",".join(f"device=/proc/self/fd/{fd}" for fd in self.devices)

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_direct(snapshot: Snapshot, cache: NodeCache) -> DirectDevice | None:
    """The snapshot as local files, when all its bytes are here and right; else None.

    The first time each chunk is hashed (449 MiB took a second) and the files are synced; later
    the markers are compared. None as well for metadata of more than 8 MiB, more layers than
    mount(2) has room for, and a cache that cannot store the device table.
    """
    with ExitStack() as stack:
        pool = ExtentPool(cache)
        extents: list[ExtentCache] = []
        slots: list[DeviceSlot] = []
        # The hash tree, if there is one, comes after the layers: no inode refers to it.
        layers = zip(snapshot.chunk_map.extents, snapshot.config.extents, strict=False)
        for extent, stated in layers:
            if not extent.total_blocks:
                continue
            held = pool.acquire(extent)
            stack.callback(pool.release, held)
            if not (held.on_disk and held.local):
                return None
            extents.append(held)
            tag = held.id[:32].encode()
            slots.append(DeviceSlot(tag, extent.total_blocks, stated.base_block))
        if not all(_verified(cache, held) for held in extents):
            return None
        file = _metadata(snapshot, cache, slots)
        if file is None:
            return None
        stack.callback(file.close)
        path = Path(str(file.name))
        device = DirectDevice(path, tuple(held.data_fd for held in extents), stack)
        if len(device.mount_options) > MOUNT_OPTIONS_MAX:
            return None
        return DirectDevice(path, device.devices, stack.pop_all())


def _verified(cache: NodeCache, held: ExtentCache) -> bool:
    """Whether every chunk of an extent is right, by its marker or by hashing; then marks it."""
    path = cache.extent_directory(held.id) / MARKER
    before = VerifiedMarker.of(held.data_fd, held.id)
    if _marker(path) == before:
        return True
    age_ns = time.time_ns() - before.ctime_ns
    if 0 <= age_ns < _RACY_NS:
        time.sleep(_RACY_NS / 1e9)
    if held.missing(range(len(held.extent))):
        return False
    try:
        os.fsync(held.data_fd)
        if VerifiedMarker.of(held.data_fd, held.id) != before:
            return False  # somebody writes to it: the next mount will find it at rest
        with cache.new_file(path) as file:
            file.write(before.pack())
    except (OSError, ImgsnapError) as error:
        # The chunks are right all the same; they are hashed again next time.
        _log.info("cannot mark extent %s as verified: %s", held.id, error)
    return True


def _marker(path: Path) -> VerifiedMarker | None:
    try:
        with path.open("rb") as file:
            return VerifiedMarker.parse(file.read(VerifiedMarker.SIZE + 1))
    except FileNotFoundError:
        return None
    except (OSError, FormatError) as error:
        _log.warning("%s is not used: %s", path, error)
        return None


def _metadata(snapshot: Snapshot, cache: NodeCache, slots: list[DeviceSlot]) -> BinaryIO | None:
    """The metadata with its device table, from the cache or made now; leased."""
    name = snapshot.manifest.config.digest  # it states the region's digest and every extent
    path = cache.root / "direct" / digest_hex(name)
    size = snapshot.metadata_size + len(slots) * DEVICE_SLOT.size
    file = cache.open_leased(path)
    if file is not None:
        if sealed_intact(file.fileno(), size, name):
            return file
        file.close()
        cache.quarantine(path, "its sum does not match its bytes")
    region = os.pread(snapshot.metadata.fileno(), snapshot.metadata_size, 0)
    try:
        content = with_devices(region, slots)
    except (LimitExceeded, FormatError) as error:
        _log.info("snapshot %s is not mounted directly: %s", name, error)
        return None
    return cache.open_leased(path) if cache.store_sealed(path, name, content) else None
