"""The node cache: verified content on this machine's disk, shared by all snapshots and processes.

::

    <root>/v1/                        the format version; another version is another tree
      blobs/<hex>                     manifests and configs as the repository sent them, by sha256
      chunk-maps/<hex>                decompressed chunk maps, by sha256 of the blob; with FOOTER
      metadata/<hex>                  metadata regions, by sha256 of the region; with FOOTER
      boot-packs/<hex>                whole boot packs, by sha256 (boot_stream.py)
      packs/<hex>                     whole packs, only from servers without range requests
      tags/<hex>                      what a tag or image named last, for when the registry is away
      extents/<extent id>/data        an extent's bytes, sparse
      extents/<extent id>/present     which of its chunks were written (extent_cache.py)
      tmp/                            files being written, named by process

Every file but an extent's two is immutable: it is written under ``tmp/`` and renamed, so that a
name that exists has all its bytes, and two processes that make the same file both win. Nothing
here is trusted because of its name: small blobs are hashed again when they are read, decompressed
ones carry a BLAKE3 sum (0.3 ms/MiB where sha256 needs up to 5), chunks are hashed on first use.
"""

import errno
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from imgsnap.digest import Digest, digest_hex, sha256_digest
from imgsnap.errors import AccessDenied, ImgsnapError, ResourceExhausted
from imgsnap.units import MIB

CACHE_VERSION = "v1"

FOOTER = struct.Struct("<32sQ4sI")
"""After decompressed content: 0 32 BLAKE3 of the content · 32 8 u64 its size · 40 4 magic ·
44 4 u32 CRC-32 of the 44 bytes before it"""
FOOTER_MAGIC = b"ISDC"
assert FOOTER.size == 48

STALE_S = 86_400
"""A temporary file this old belongs to nobody: no pack takes a day."""

_DIRECTORIES = ("blobs", "boot-packs", "chunk-maps", "metadata", "packs", "tags", "extents", "tmp")


class NodeCache:
    """The cache under one root directory. Safe for threads and for several processes."""

    def __init__(self, root: Path) -> None:
        """Raises AccessDenied or ResourceExhausted when the directories cannot be made."""
        self.root = root / CACHE_VERSION
        self._serial = 0
        self._lock = threading.Lock()
        try:
            for name in _DIRECTORIES:
                (self.root / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise cache_error(error, f"cannot make the node cache {root}") from error

    # Small blobs -----------------------------------------------------------------------------

    def load_blob(self, digest: Digest) -> bytes | None:
        """A small blob, hashed again; None when it is absent or damaged (then it is removed)."""
        path = self.root / "blobs" / digest_hex(digest)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        if sha256_digest(raw) != digest:
            path.unlink(missing_ok=True)
            return None
        return raw

    def store_blob(self, digest: Digest, raw: bytes) -> None:
        """Keeps a blob the caller has verified, if the disk is not full."""
        self._store(self.root / "blobs" / digest_hex(digest), raw)

    def _store(self, path: Path, *parts: bytes) -> None:
        try:
            with self.new_file(path) as file:
                for part in parts:
                    file.write(part)
        except ResourceExhausted:
            return

    # Resolved names --------------------------------------------------------------------------

    def load_tag(self, key: str) -> bytes | None:
        """What `store_tag` kept for this key."""
        try:
            return self._tag_path(key).read_bytes()
        except OSError:
            return None

    def store_tag(self, key: str, value: bytes) -> None:
        self._store(self._tag_path(key), value)

    def _tag_path(self, key: str) -> Path:
        return self.root / "tags" / digest_hex(sha256_digest(key.encode()))

    # Chunk maps ------------------------------------------------------------------------------

    def load_chunk_map(self, digest: Digest) -> bytes | None:
        """The decompressed content of a chunk map blob; None when it is absent or damaged.

        Kept decompressed so that opening from the cache need not load a decompressor (5 ms).
        """
        path = self.root / "chunk-maps" / digest_hex(digest)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        content = raw[: -FOOTER.size]
        if raw[len(content) :] != _footer(content):
            path.unlink(missing_ok=True)
            return None
        return content

    def store_chunk_map(self, digest: Digest, content: bytes) -> None:
        """Keeps what a verified chunk map blob decompressed to, if the disk is not full."""
        self._store(self.root / "chunk-maps" / digest_hex(digest), content, _footer(content))

    # Metadata regions ------------------------------------------------------------------------

    def open_metadata(self, digest: Digest, size: int) -> BinaryIO | None:
        """A verified metadata region of `size` bytes, or None when it is absent or damaged.

        The file is longer than the region: the footer follows it.
        """
        path = self.root / "metadata" / digest_hex(digest)
        try:
            file = path.open("rb", buffering=0)
        except OSError:
            return None
        if _metadata_intact(file.fileno(), size):
            return file
        file.close()
        path.unlink(missing_ok=True)
        return None

    def store_metadata(self, digest: Digest, region: bytes) -> BinaryIO:
        """Keeps a region whose sha256 the caller has verified, and opens it.

        On a full disk the region lives in an anonymous memory file instead.
        """
        footer = _footer(region)
        path = self.root / "metadata" / digest_hex(digest)
        try:
            with self.new_file(path) as file:
                file.write(region)
                file.write(footer)
            return path.open("rb", buffering=0)
        except (ResourceExhausted, FileNotFoundError):
            memory = os.memfd_create("imgsnap-metadata", os.MFD_CLOEXEC)
            with memoryview(region) as view:
                done = 0
                while done < len(view):
                    done += os.write(memory, view[done : done + MIB])
            return os.fdopen(memory, "rb", buffering=0)

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
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise cache_error(error, f"cannot write {path}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

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
    """Deletes a file or a directory of plain files; nothing when it is gone already."""
    try:
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                remove_tree(child)
            path.rmdir()
        else:
            path.unlink()
    except FileNotFoundError:
        return


def cache_error(error: OSError, what: str) -> ImgsnapError:
    """An operating system error about the cache, as one of ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceExhausted(
            f"{what}: {error.strerror}", hint="free disk space or move the cache (--cache-dir)"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(f"{what}: {error.strerror}", hint="run as root or use --cache-dir")
    return ImgsnapError(f"{what}: {error.strerror or error}")


def _footer(content: bytes) -> bytes:
    from blake3 import blake3

    head = FOOTER.pack(blake3(content).digest(), len(content), FOOTER_MAGIC, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def _metadata_intact(fd: int, size: int) -> bool:
    """Whether the open file is a region of `size` bytes with its footer and the right sum."""
    from blake3 import blake3

    if os.fstat(fd).st_size != size + FOOTER.size:
        return False
    raw = os.pread(fd, FOOTER.size, size)
    total, stated, magic, crc = FOOTER.unpack(raw)
    if magic != FOOTER_MAGIC or stated != size or zlib.crc32(raw[:-4]) != crc:
        return False
    hasher = blake3()
    buffer = memoryview(bytearray(min(size, MIB)))
    position = 0
    while position < size:
        count = os.preadv(fd, (buffer[: min(MIB, size - position)],), position)
        if not count:
            return False
        hasher.update(buffer[:count])
        position += count
    return bool(hasher.digest() == total)
