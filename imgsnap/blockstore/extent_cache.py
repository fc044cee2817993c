"""The extent cache: one sparse file and one presence map per extent, shared by everyone.

A chunk's data is written before its presence byte. Neither is synced: a chunk that was found on
disk is hashed before its first use in a process, so a crash, a power cut or a flipped bit costs
a fetch, never a wrong byte. The map has a byte per chunk, because setting a bit would be a
read-modify-write that loses the bits of other processes.

While an extent is open its data file is leased (lease.py), so that eviction leaves it alone. Chunks
are never evicted one by one: a reader could see the hole as zeros. The modification time of the map
is the time of last use.
"""

import errno
import logging
import os
import stat
import struct
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, NamedTuple

from imgsnap.blockstore import lease
from imgsnap.blockstore.node_cache import NodeCache, cache_error, remove_tree
from imgsnap.blockstore.statistics import CacheCounts
from imgsnap.blockstore.write_budget import WriteBudget
from imgsnap.digest import chunk_id
from imgsnap.errors import FormatError, ImgsnapError
from imgsnap.formats.chunk_map import ZERO_PACK, Extent
from imgsnap.units import BLOCK_BITS, BLOCK_SIZE

RECORD = "presence map"

ABSENT, UNVERIFIED, VERIFIED = range(3)
"""What this process knows of a chunk; ABSENT may be outdated by another process."""

_PRESENT = b"\x01"
_GONE = b"\x00"
_OPEN_ATTEMPTS = 8
_OPEN_WAIT_S = 0.002
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PresenceHeader:
    """offset size type name: 0 8 magic · 8 2 u16 version · 10 2 reserved · 12 4 u32 chunk_count ·
    16 4 u32 total_blocks · 20 32 extent id · 52 8 reserved · 60 4 u32 CRC-32 of bytes 0 to 59.
    One byte per chunk follows, 1 when its data is in the data file."""

    MAGIC: ClassVar[bytes] = b"IMGSNPPR"
    VERSION: ClassVar[int] = 1
    STRUCT: ClassVar[struct.Struct] = struct.Struct("<8sHHII32s8xI")
    SIZE: ClassVar[int] = 64

    chunk_count: int
    total_blocks: int
    extent_id: str

    def pack(self) -> bytes:
        fields = (self.MAGIC, self.VERSION, 0, self.chunk_count, self.total_blocks)
        raw = self.STRUCT.pack(*fields, bytes.fromhex(self.extent_id), 0)[:-4]
        return raw + zlib.crc32(raw).to_bytes(4, "little")

    @classmethod
    def parse(cls, raw: bytes) -> "PresenceHeader":
        """Raises FormatError."""
        if len(raw) < cls.SIZE:
            raise FormatError(RECORD, "header", 0, f"{len(raw)} bytes, {cls.SIZE} needed")
        magic, version, _, chunks, blocks, extent, crc = cls.STRUCT.unpack_from(raw)
        if magic != cls.MAGIC or version != cls.VERSION:
            raise FormatError(RECORD, "magic", 0, f"{magic!r} version {version}")
        if crc != zlib.crc32(raw[: cls.SIZE - 4]):
            raise FormatError(RECORD, "crc", 60, "does not match the header")
        return cls(chunks, blocks, extent.hex())


assert PresenceHeader.STRUCT.size == PresenceHeader.SIZE


_local = threading.local()


def _scratch(size: int) -> memoryview:
    """A buffer of this thread: making one for each chunk would cost more than hashing it."""
    buffer: bytearray | None = getattr(_local, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _local.buffer = bytearray(size)
    return memoryview(buffer)[:size]


class ExtentCache:
    """One extent's chunks on this node. Offsets are bytes from the extent's start.

    Safe for threads; other processes may use the same files.
    """

    def __init__(
        self, extent: Extent, files: "_Files", counts: CacheCounts, budget: WriteBudget
    ) -> None:
        self.extent = extent
        self.id = files.extent_id
        self.size = extent.total_blocks << BLOCK_BITS
        self.starts = array("I", accumulate(extent.blocks, initial=0))
        """First block of each chunk, and the block after the last."""
        self._data = files.data
        self._map = files.present
        self._storing = files.storing
        self._counts = counts
        self._budget = budget
        self._warned = False
        self._lock = threading.Lock()
        known = os.pread(files.present, len(extent), PresenceHeader.SIZE)
        self._state = bytearray(
            UNVERIFIED if pack == ZERO_PACK or on_disk else ABSENT
            for pack, on_disk in zip(extent.pack, known.ljust(len(extent), _GONE), strict=True)
        )

    # Geometry --------------------------------------------------------------------------------

    def rows(self, offset: int, end: int) -> range:
        """The chunks that hold bytes [offset, end), a non-empty range inside the extent."""
        first = bisect_right(self.starts, offset >> BLOCK_BITS) - 1
        return range(first, bisect_right(self.starts, (end - 1) >> BLOCK_BITS, first))

    def place(self, row: int) -> tuple[int, int]:
        """Offset and size of a chunk in the extent, in bytes."""
        return self.starts[row] << BLOCK_BITS, self.extent.blocks[row] << BLOCK_BITS

    # State -----------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether every chunk is here and verified by this process."""
        return self._state.count(VERIFIED) == len(self._state)

    @property
    def local(self) -> bool:
        """Whether every chunk is on disk, verified or not, as far as this process knows."""
        return not self._state.count(ABSENT)

    @property
    def on_disk(self) -> bool:
        """Whether the files are the cache's own, and not stand-ins in memory."""
        return self._storing

    @property
    def data_fd(self) -> int:
        """The data file's descriptor, valid until the extent is released."""
        return self._data

    @property
    def storing(self) -> bool:
        """False when the disk refused the last chunk, the cache is full or not to be opened."""
        return self._storing and not self._warned and self._budget.storing

    def verified(self, row: int) -> bool:
        """Whether this process has already verified the chunk."""
        return self._state[row] == VERIFIED

    def missing(self, rows: range) -> list[int]:
        """Those of these chunks that have to be fetched; hashes those found on disk."""
        state = self._state
        if state.count(VERIFIED, rows.start, rows.stop) == len(rows):
            return []
        return [row for row in rows if state[row] != VERIFIED and not self._verify(row)]

    def absent(self, rows: range) -> list[int]:
        """As `missing`, from memory only: chunks on disk count as present, unread."""
        return [row for row in rows if self._state[row] == ABSENT]

    def _verify(self, row: int) -> bool:
        """Hashes a chunk that the map says is on disk; a damaged one becomes absent."""
        if self._state[row] == ABSENT and not self._listed(row):
            return False
        if self._intact(row):
            self._state[row] = VERIFIED
            return True
        with self._lock:
            # Another thread may have fetched it again since.
            if self._state[row] == VERIFIED or self._intact(row):
                self._state[row] = VERIFIED
                return True
            self._state[row] = ABSENT
            self._mark(row, _GONE)
        self._counts.damage += 1
        offset, size = self.place(row)
        _log.warning(
            "cached chunk %s is damaged (extent %s, bytes %d+%d); fetching it again",
            self.extent.chunk_id(row).hex(),
            self.id,
            offset,
            size,
        )
        return False

    def _intact(self, row: int) -> bool:
        offset, size = self.place(row)
        buffer = _scratch(size)
        try:
            count = os.preadv(self._data, (buffer,), offset)
        except OSError as error:
            _log.warning("cannot read the cache of extent %s: %s", self.id, error)
            return False
        return count == size and chunk_id(buffer) == self.extent.chunk_id(row)

    def _listed(self, row: int) -> bool:
        return os.pread(self._map, 1, PresenceHeader.SIZE + row) == _PRESENT

    # Data ------------------------------------------------------------------------------------

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fills `view` if all its chunks are here, hashing those found on disk; else False.

        False too when the file has become shorter or unreadable: its chunks are then distrusted
        and will be verified again.
        """
        rows = self.rows(offset, offset + len(view))
        if self._state.count(VERIFIED, rows.start, rows.stop) == len(rows):
            return self._fill(view, offset, rows)
        return self._fill_verifying(view, offset, rows)

    def _fill(self, view: memoryview, offset: int, rows: range) -> bool:
        try:
            # A regular file is short only at its end, so one call is enough.
            if os.preadv(self._data, (view,), offset) == len(view):
                return True
        except OSError as error:
            _log.warning("cannot read the cache of extent %s: %s", self.id, error)
        with self._lock:
            for row in rows:
                if self._state[row] == VERIFIED:
                    self._state[row] = UNVERIFIED
        return False

    def _fill_verifying(self, view: memoryview, offset: int, rows: range) -> bool:
        """As `_fill` for chunks of which some are not verified yet.

        Those that lie wholly in `view` are hashed there, which spares them a second copy.
        """
        state = self._state
        inside: list[tuple[int, memoryview]] = []
        for row in rows:
            if state[row] == VERIFIED:
                continue
            start, size = self.place(row)
            begin = start - offset
            if begin < 0 or begin + size > len(view):
                if not self._verify(row):
                    return False
            elif state[row] == ABSENT and not self._listed(row):
                return False
            else:
                inside.append((row, view[begin : begin + size]))
        if not self._fill(view, offset, rows):
            return False
        for row, content in inside:
            if chunk_id(content) != self.extent.chunk_id(row):
                # Damaged, or repaired by another thread after we read it.
                return self._verify(row) and self.read_into(view, offset)
            state[row] = VERIFIED
        return True

    def store(self, row: int, data: bytes) -> bool:
        """Keeps a chunk whose hash the caller has verified. False when it cannot be kept."""
        if not self._storing or not self._budget.take(len(data)):
            return False
        try:
            return self._keep(row, data)
        finally:
            self._budget.done(len(data))

    def _keep(self, row: int, data: bytes) -> bool:
        try:
            self._write(data, self.place(row)[0])
        except OSError as error:
            if not self._warned:
                self._warned = True
                _log.warning("cannot cache extent %s: %s; serving from memory", self.id, error)
            return False
        with self._lock:
            if self.extent.pack[row] != ZERO_PACK:
                self._mark(row, _PRESENT)
            self._state[row] = VERIFIED
        self._warned = False
        return True

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._data, view, offset)
            view, offset = view[count:], offset + count

    def _mark(self, row: int, value: bytes) -> None:
        try:
            os.pwrite(self._map, value, PresenceHeader.SIZE + row)
        except OSError as error:
            # The next process hashes or fetches the chunk once more; nothing is lost here.
            _log.warning("cannot write the presence map of extent %s: %s", self.id, error)

    def close(self) -> None:
        """Nothing may be read later; a transfer that ends later writes to no descriptor at all,
        rather than to one that has been given to another file."""
        with self._lock:
            data, presence = self._data, self._map
            self._data = self._map = -1
            self._storing = False
        _used_now(presence)
        os.close(data)
        os.close(presence)


class ExtentPool:
    """The extents this process has open: snapshots that share a layer share its cache."""

    def __init__(self, cache: NodeCache) -> None:
        self.counts = CacheCounts()
        self._cache = cache
        self._lock = threading.Lock()
        self._open: dict[str, tuple[ExtentCache, int]] = {}

    def acquire(self, extent: Extent) -> ExtentCache:
        """The extent's cache; every acquire needs one `release`."""
        extent_id = extent.id
        with self._lock:
            known, users = self._open.get(extent_id, (None, 0))
            if known is None:
                files = _open_files(self._cache, extent_id, extent)
                known = ExtentCache(extent, files, self.counts, self._cache.budget)
            self._open[extent_id] = (known, users + 1)
            return known

    def release(self, cache: ExtentCache) -> None:
        with self._lock:
            known, users = self._open[cache.id]
            if users > 1:
                self._open[cache.id] = (known, users - 1)
                return
            del self._open[cache.id]
        known.close()


class _Files(NamedTuple):
    """The open files of one extent; `storing` is False when they are stand-ins in memory."""

    extent_id: str
    data: int
    present: int
    storing: bool


def _open_files(cache: NodeCache, extent_id: str, extent: Extent) -> _Files:
    """Opens or makes an extent's files; stand-ins that store nothing when that is impossible."""
    header = PresenceHeader(len(extent), extent.total_blocks, extent_id)
    directory = cache.extent_directory(extent_id)
    try:
        for _ in range(_OPEN_ATTEMPTS):
            files, problem = _open_existing(directory, header)
            if files is not None:
                return files
            if problem:
                _log.warning("discarding the cache of extent %s: %s", extent_id, problem)
                _discard(cache, directory)
            elif directory.exists():
                time.sleep(_OPEN_WAIT_S)  # somebody is just evicting it
            _create(cache, directory, header)
        raise ImgsnapError(f"cannot open {directory}: it keeps changing")
    except ImgsnapError as error:
        _log.warning("%s; serving extent %s from memory", error, extent_id)
    data, present = (os.memfd_create(f"imgsnap-{name}") for name in ("data", "present"))
    os.ftruncate(data, extent.total_blocks * BLOCK_SIZE)
    os.ftruncate(present, header.SIZE + len(extent))
    return _Files(extent_id, data, present, storing=False)


def _open_existing(directory: Path, header: PresenceHeader) -> tuple[_Files | None, str]:
    """The files, leased, if they exist and fit each other and the extent; else why they do not.

    Neither when there are none, or when they are being evicted.
    """
    fds: list[int] = []
    try:
        problem = _open_both(directory, header, fds)
        if not problem:
            top, data, present = fds
            # Before the lease the directory may have been evicted, and even made anew.
            if lease.hold(data) and lease.names(directory, top):
                fds[:] = [top]
                _used_now(present)
                return _Files(header.extent_id, data, present, storing=True), ""
    except FormatError as error:
        problem = str(error)
    except OSError as error:
        if error.errno in (errno.ENOENT, *_NOT_OURS):
            problem = str(error) if os.path.lexists(directory) else ""
        else:
            raise cache_error(error, f"cannot open {directory}") from error
    finally:
        for fd in fds:
            os.close(fd)
    return None, problem


_NOT_OURS = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM)
"""What opening something else than the file we made says."""


def _open_both(directory: Path, header: PresenceHeader, fds: list[int]) -> str:
    """Appends the directory, the data and the map; why they do not fit, or "". Raises OSError.

    Through the directory's descriptor: data and map are always of the same one.
    """
    fds.append(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
    for name in ("data", "present"):
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fds.append(os.open(name, flags, dir_fd=fds[0]))
    data, present = map(os.fstat, fds[1:])
    fits = (
        stat.S_ISREG(data.st_mode)
        and stat.S_ISREG(present.st_mode)
        and data.st_size == header.total_blocks * BLOCK_SIZE
        and present.st_size == header.SIZE + header.chunk_count
        and PresenceHeader.parse(os.pread(fds[2], header.SIZE, 0)) == header
    )
    return "" if fits else "the presence map does not fit its data file"


def _used_now(present: int) -> None:
    """Keeps the time of last use."""
    with suppress(OSError):
        os.utime(present)


def _discard(cache: NodeCache, directory: Path) -> None:
    """Moves the directory away first: a process that has it open goes on with its files."""
    moved = cache.temporary_path()
    try:
        directory.rename(moved)
    except FileNotFoundError:
        return
    except OSError as error:
        raise cache_error(error, f"cannot discard {directory}") from error
    with suppress(OSError):
        remove_tree(moved)


def _create(cache: NodeCache, directory: Path, header: PresenceHeader) -> None:
    """Makes both files under tmp/ and renames their directory; another process may be first."""
    temporary = cache.temporary_path()
    try:
        temporary.mkdir(mode=0o700)
        (temporary / "present").write_bytes(header.pack() + bytes(header.chunk_count))
        with (temporary / "data").open("wb") as file:
            file.truncate(header.total_blocks * BLOCK_SIZE)
        temporary.rename(directory)
    except OSError as error:
        with suppress(OSError):
            remove_tree(temporary)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise cache_error(error, f"cannot make {directory}") from error
