"""The node cache: verified content on this machine's disk, shared by all snapshots and processes.

::

    <root>/v1/                        the format version; another version is another tree
      blobs/<hex>                     manifests and configs as the repository sent them, by sha256
      chunk-maps/<hex>                decompressed chunk maps, by sha256 of the blob; with FOOTER
      metadata/<hex>                  metadata regions, by sha256 of the region; with FOOTER
      boot-packs/<hex>                whole boot packs, by sha256 (boot_stream.py)
      packs/<hex>                     whole packs, only from servers without range requests
      tags/<hex>                      what a tag or image named last, for when the registry is
                                      away; with FOOTER
      extents/<extent id>/data        an extent's bytes, sparse
      extents/<extent id>/present     which of its chunks were written (extent_cache.py)
      direct/<hex>                    metadata with a device table, for mounts without a server
      pins/<hex>.<holder>             what must not be evicted (cache_pins.py)
      quarantine/                     what turned out damaged, for whoever wants to know why
      quota                           the most bytes that all this may take (cache_quota.py)
      lock                            flock of the process that evicts
      tmp/                            files being written, named by process

Every file but an extent's two is immutable: it is written under ``tmp/`` and renamed, so that a
name that exists has all its bytes, and two processes that make the same file both win. Nothing
here is trusted because of its name: small blobs are hashed again when they are read, decompressed
ones carry a BLAKE3 sum over name and content (0.3 ms/MiB where sha256 needs up to 5), chunks are
hashed on first use.

A cache that cannot store (full disk, quota, wrong permissions, something else in a file's place)
answers "absent" and keeps nothing: readers are then served from the repository.
"""

import errno
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from imgsnap.blockstore import lease
from imgsnap.blockstore.write_budget import WriteBudget
from imgsnap.digest import Digest, digest_hex, digest_to_raw, sha256_digest
from imgsnap.errors import AccessDenied, ImgsnapError, ResourceExhausted
from imgsnap.units import MIB

CACHE_VERSION = "v1"

FOOTER = struct.Struct("<32sQ4sI")
"""After decompressed content: 0 32 BLAKE3 of the raw digest that names the file and the content ·
32 8 u64 the content's size · 40 4 magic · 44 4 u32 CRC-32 of the 44 bytes before it"""
FOOTER_MAGIC = b"ISDC"
assert FOOTER.size == 48

STALE_S = 86_400
"""A temporary file this old belongs to nobody: no pack takes a day."""

QUARANTINE_MAX = 64 * MIB
"""Bytes that damaged files may take; the oldest go first."""

_DIRECTORIES = (
    "blobs",
    "boot-packs",
    "chunk-maps",
    "metadata",
    "packs",
    "tags",
    "extents",
    "direct",
    "pins",
    "quarantine",
    "tmp",
)
_log = logging.getLogger(__name__)


class NodeCache:
    """The cache under one root directory. Safe for threads and for several processes.

    `quota`: the most bytes it may take, in place of the one kept with the cache.
    """

    def __init__(self, root: Path, *, quota: int | None = None) -> None:
        """Raises AccessDenied when the directories cannot be made; a full disk is no error."""
        self.root = root / CACHE_VERSION
        self.quota = quota
        self.budget = WriteBudget(self._room)
        self._serial = 0
        self._lock = threading.Lock()
        try:
            for name in _DIRECTORIES:
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            problem = cache_error(error, f"cannot make the node cache {root}")
            if not isinstance(problem, ResourceExhausted):
                raise problem from error
            _log.warning("%s; serving without storing", problem)

    def _room(self) -> int | None:
        """Evicts down to the quota; the bytes of room that are left, None without a quota."""
        from imgsnap.blockstore.cache_quota import enforce

        return enforce(self)

    # Small blobs -----------------------------------------------------------------------------

    def load_blob(self, digest: Digest) -> bytes | None:
        """A small blob, hashed again; None when it is absent or damaged (then it is removed)."""
        path = self.root / "blobs" / digest_hex(digest)
        raw = self._read(path)
        if raw is not None and sha256_digest(raw) != digest:
            self.quarantine(path, "its bytes are not those of its digest")
            return None
        return raw

    def store_blob(self, digest: Digest, raw: bytes) -> None:
        """Keeps a blob the caller has verified, if the disk is not full."""
        self._store(self.root / "blobs" / digest_hex(digest), raw)

    def _read(self, path: Path) -> bytes | None:
        """A file's bytes, None when there is none or it cannot be read; marks it as used."""
        try:
            with path.open("rb") as file:
                with suppress(OSError):
                    os.utime(file.fileno())
                return file.read()
        except OSError:
            return None

    def _store(self, path: Path, *parts: bytes) -> bool:
        size = sum(map(len, parts))
        if not self.budget.take(size):
            return False
        try:
            with self.new_file(path) as file:
                for part in parts:
                    file.write(part)
        except ImgsnapError as error:
            _log.info("%s; it is not kept", error)
            return False
        finally:
            self.budget.done(size)
        return True

    # Resolved names --------------------------------------------------------------------------

    def load_tag(self, key: str) -> bytes | None:
        """What `store_tag` kept for this key."""
        name = sha256_digest(key.encode())
        return self._load_sealed(self.root / "tags" / digest_hex(name), name)

    def store_tag(self, key: str, value: bytes) -> None:
        name = sha256_digest(key.encode())
        self.store_sealed(self.root / "tags" / digest_hex(name), name, value)

    # Chunk maps ------------------------------------------------------------------------------

    def load_chunk_map(self, digest: Digest) -> bytes | None:
        """The decompressed content of a chunk map blob; None when it is absent or damaged.

        Kept decompressed so that opening from the cache need not load a decompressor (5 ms).
        """
        return self._load_sealed(self.root / "chunk-maps" / digest_hex(digest), digest)

    def _load_sealed(self, path: Path, name: Digest) -> bytes | None:
        raw = self._read(path)
        if raw is None:
            return None
        content = without_footer(name, raw)
        if content is None:
            self.quarantine(path, "its sum does not match its bytes and name")
        return content

    def store_chunk_map(self, digest: Digest, content: bytes) -> None:
        """Keeps what a verified chunk map blob decompressed to, if the disk is not full."""
        self.store_sealed(self.root / "chunk-maps" / digest_hex(digest), digest, content)

    # Metadata regions ------------------------------------------------------------------------

    def open_metadata(self, digest: Digest, size: int) -> BinaryIO | None:
        """A verified metadata region of `size` bytes, or None when it is absent or damaged.

        The file is longer than the region: the footer follows it.
        """
        path = self.root / "metadata" / digest_hex(digest)
        file = self.open_leased(path)
        if file is None:
            return None
        if sealed_intact(file.fileno(), size, digest):
            return file
        file.close()
        self.quarantine(path, "its sum does not match its bytes")
        return None

    def open_leased(self, path: Path) -> BinaryIO | None:
        """A file that is not evicted while it is open; None when it is absent or unreadable."""
        try:
            file = path.open("rb", buffering=0)
        except OSError:
            return None
        if lease.hold(file.fileno()) and lease.names(path, file.fileno()):
            with suppress(OSError):
                os.utime(file.fileno())
            return file
        file.close()
        return None

    def store_metadata(self, digest: Digest, region: bytes) -> BinaryIO:
        """Keeps a region whose sha256 the caller has verified, and opens it.

        When it cannot be kept the region lives in an anonymous memory file instead.
        """
        path = self.root / "metadata" / digest_hex(digest)
        kept = self.open_leased(path) if self.store_sealed(path, digest, region) else None
        return kept or _in_memory(region)

    def store_sealed(self, path: Path, name: Digest, content: bytes) -> bool:
        """Keeps verified content with FOOTER, if there is room; whether it did."""
        return self._store(path, content, footer(name, content))

    # Packs and extents -----------------------------------------------------------------------

    def pack_path(self, digest: Digest) -> Path:
        return self.root / "packs" / digest_hex(digest)

    def boot_pack_path(self, digest: Digest) -> Path:
        return self.root / "boot-packs" / digest_hex(digest)

    def extent_directory(self, extent_id: str) -> Path:
        return self.root / "extents" / extent_id

    # Writing ---------------------------------------------------------------------------------

    def temporary_path(self) -> Path:
        """A fresh name under tmp/, on the same file system as everything else here."""
        with self._lock:
            self._serial += 1
            serial = self._serial
        return self.root / "tmp" / f"{os.getpid()}.{threading.get_native_id()}.{serial}"

    def anonymous_file(self) -> int:
        """The descriptor of a new file on the cache's disk that has no name.

        Raises ResourceExhausted or AccessDenied.
        """
        path = self.temporary_path()
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            path.unlink()
        except OSError as error:
            raise cache_error(error, f"cannot make {path}") from error
        return file

    @contextmanager
    def new_file(self, path: Path) -> Iterator[BinaryIO]:
        """A file that appears at `path` when the block ends without an exception.

        Not synced: readers verify content, so a file that a power cut emptied is fetched again.
        Raises ResourceExhausted when the disk is full, AccessDenied when it is read-only.
        """
        temporary = self.temporary_path()
        try:
            with temporary.open("wb") as file:
                yield file
            if path.is_dir():
                self.quarantine(path, "a directory stands in a file's place")
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise cache_error(error, f"cannot write {path}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def quarantine(self, path: Path, why: str) -> None:
        """Moves a damaged file or directory out of the way; it is fetched again on next use."""
        _log.warning("%s/%s is damaged: %s", path.parent.name, path.name, why)
        place = self.root / "quarantine"
        moved = place / f"{path.parent.name}.{path.name}.{time.time_ns()}"
        try:
            path.rename(moved)
        except FileNotFoundError:
            return  # somebody else saw it first
        except OSError:
            remove_tree(path)
            return
        with suppress(OSError):
            os.utime(moved)
        _trim(place, QUARANTINE_MAX)

    def remove_stale_temporaries(self) -> int:
        """Deletes what dead processes left under tmp/; how many entries.

        Told by age and not by pid: processes of other pid namespaces may share this cache.
        """
        count = 0
        for entry in (self.root / "tmp").iterdir():
            try:
                age_s = time.time() - entry.stat().st_mtime
            except FileNotFoundError:
                continue
            if age_s > STALE_S:
                remove_tree(entry)
                count += 1
        return count


def remove_tree(path: Path) -> None:
    """Deletes a file or a directory of plain files; nothing when it is gone already.

    Raises OSError for what cannot be deleted.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                remove_tree(child)
            path.rmdir()
        else:
            path.unlink()
    except FileNotFoundError:
        return


def allocated(path: Path) -> int:
    """Bytes that a file, or a directory with all that is in it, takes on disk."""
    try:
        own = path.lstat().st_blocks * 512
        if path.is_dir() and not path.is_symlink():
            return own + sum(map(allocated, path.iterdir()))
    except OSError:
        return 0
    return own


def _trim(place: Path, size_max: int) -> None:
    """Deletes the oldest entries of a directory until the others take at most `size_max`."""

    def age(path: Path) -> float:
        try:
            return path.lstat().st_mtime
        except OSError:
            return 0.0

    left = size_max
    for entry in sorted(place.iterdir(), key=age, reverse=True):
        left -= allocated(entry)
        if left < 0:
            with suppress(OSError):
                remove_tree(entry)


def _in_memory(region: bytes) -> BinaryIO:
    memory = os.memfd_create("imgsnap-metadata", os.MFD_CLOEXEC)
    with memoryview(region) as view:
        done = 0
        while done < len(view):
            done += os.write(memory, view[done : done + MIB])
    return os.fdopen(memory, "rb", buffering=0)


def cache_error(error: OSError, what: str) -> ImgsnapError:
    """An operating system error about the cache, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceExhausted(
            f"{what}: {error.strerror}", hint="free disk space or move the cache (--cache-dir)"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{what}: {error.strerror}", hint="run as root or use --cache-dir")
    return ImgsnapError(f"{what}: {error.strerror or error}")


def footer(name: Digest, content: bytes) -> bytes:
    """What follows `content` in the file that is called `name`, see FOOTER."""
    from blake3 import blake3

    total = blake3(digest_to_raw(name)).update(content).digest()
    head = FOOTER.pack(total, len(content), FOOTER_MAGIC, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def without_footer(name: Digest, raw: bytes) -> bytes | None:
    """The content of a file that `footer` ends; None when they do not fit each other."""
    content = raw[: -FOOTER.size]
    return content if raw[len(content) :] == footer(name, content) else None


def sealed_intact(fd: int, size: int, name: Digest) -> bool:
    """Whether the open file called `name` is `size` bytes and their footer, with the right sum."""
    from blake3 import blake3

    if os.fstat(fd).st_size != size + FOOTER.size:
        return False
    raw = os.pread(fd, FOOTER.size, size)
    total, stated, magic, crc = FOOTER.unpack(raw)
    if magic != FOOTER_MAGIC or stated != size or zlib.crc32(raw[:-4]) != crc:
        return False
    hasher = blake3(digest_to_raw(name))
    buffer = memoryview(bytearray(min(size, MIB)))
    position = 0
    while position < size:
        count = os.preadv(fd, (buffer[: min(MIB, size - position)],), position)
        if not count:
            return False
        hasher.update(buffer[:count])
        position += count
    return bool(hasher.digest() == total)
