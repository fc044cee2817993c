"""Whole packs on disk, for servers that ignore Range requests."""

import hashlib
import logging
import os
import threading
from typing import BinaryIO

from imgsnap.blockstore import lease
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest
from imgsnap.errors import DigestMismatch, IntegrityError, ResourceExhausted
from imgsnap.oci.repository import Descriptor, Repository
from imgsnap.units import MIB

MEMORY_PACK_MAX = 128 * MIB
"""Bytes of a pack that is kept in memory because the disk has no room; ours have 64 MiB."""
MEMORY_PACKS = 2
_log = logging.getLogger(__name__)


class PackFiles:
    """The packs under the node cache. Safe for threads; one download of a pack at a time is the
    caller's business."""

    def __init__(self, cache: NodeCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._fds: dict[Digest, int | None] = {}
        self._in_memory: list[Descriptor] = []  # the oldest first

    def read(self, pack: Descriptor, offset: int, length: int) -> bytes | None:
        """Bytes of a pack that is here whole; None when it is not."""
        with self._lock:
            fd = self._open(pack)
            if fd is None:
                return None
            # Under the lock, so that `discard` cannot close the file in between.
            return os.pread(fd, length, offset)

    def has(self, pack: Descriptor) -> bool:
        """Whether the pack is here whole."""
        with self._lock:
            return self._open(pack) is not None

    def _open(self, pack: Descriptor) -> int | None:
        """Asks the disk once per pack and process: packs appear here only through `download`."""
        if pack.digest not in self._fds:
            fd: int | None = None
            try:
                path = self._cache.pack_path(pack.digest)
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                pass
            if fd is not None and not lease.hold(fd):
                os.close(fd)  # being evicted
                fd = None
            self._fds[pack.digest] = fd
        return self._fds[pack.digest]

    def download(self, repository: Repository, pack: Descriptor) -> None:
        """Fetches a whole pack and verifies its sha256 before anything can read it.

        Without room on disk it is kept in memory, and one that came before is dropped. Raises
        DigestMismatch, IntegrityError for a wrong length, ResourceExhausted when it is too large
        for memory as well, and what the repository raises.
        """
        if self._cache.budget.take(pack.size):
            try:
                with self._cache.new_file(self._cache.pack_path(pack.digest)) as file:
                    _fetch(repository, pack, file)
                self._forget(pack)
                return
            except ResourceExhausted as error:
                _log.info("%s; pack %s is kept in memory", error, pack.digest)
            finally:
                self._cache.budget.done(pack.size)
        if pack.size > MEMORY_PACK_MAX:
            raise ResourceExhausted(
                f"no room for pack {pack.digest} of {pack.size} bytes, which its server only sends "
                "whole",
                hint="free disk space or raise the quota (imgsnap cache quota)",
            )
        memory = os.memfd_create("imgsnap-pack", os.MFD_CLOEXEC)
        try:
            with os.fdopen(memory, "wb", closefd=False) as file:
                _fetch(repository, pack, file)
        except BaseException:
            os.close(memory)
            raise
        self._forget(pack)
        with self._lock:
            self._fds[pack.digest] = memory
            self._in_memory.append(pack)
            dropped = self._in_memory[:-MEMORY_PACKS]
        for old in dropped:
            self._forget(old)

    def discard(self, pack: Descriptor) -> None:
        """Deletes a pack whose bytes turned out to be damaged."""
        self._forget(pack)
        self._cache.pack_path(pack.digest).unlink(missing_ok=True)

    def _forget(self, pack: Descriptor) -> None:
        with self._lock:
            if pack in self._in_memory:
                self._in_memory.remove(pack)
            fd = self._fds.pop(pack.digest, None)
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                if fd is not None:
                    os.close(fd)
            self._fds.clear()


def _fetch(repository: Repository, pack: Descriptor, file: BinaryIO) -> None:
    hasher = hashlib.sha256()
    size = 0
    with repository.open_blob(pack) as stream:
        while data := stream.read(MIB):
            size += len(data)
            if size > pack.size:
                break
            hasher.update(data)
            file.write(data)
    if size != pack.size:
        raise IntegrityError(f"pack {pack.digest}: not the {pack.size} bytes it should be")
    got = "sha256:" + hasher.hexdigest()
    if got != pack.digest:
        raise DigestMismatch("pack", pack.digest, got)
