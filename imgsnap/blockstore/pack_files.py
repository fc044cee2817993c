"""Whole packs on disk, for servers that ignore Range requests."""

import hashlib
import os
import threading

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest
from imgsnap.errors import DigestMismatch, IntegrityError
from imgsnap.oci.repository import Descriptor, Repository
from imgsnap.units import MIB


class PackFiles:
    """The packs under the node cache. Safe for threads; one download of a pack at a time is the
    caller's business."""

    def __init__(self, cache: NodeCache) -> None:
        self._cache = cache
        self._lock = threading.Lock()
        self._fds: dict[Digest, int | None] = {}

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
            try:
                path = self._cache.pack_path(pack.digest)
                self._fds[pack.digest] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._fds[pack.digest] = None
        return self._fds[pack.digest]

    def download(self, repository: Repository, pack: Descriptor) -> None:
        """Fetches a whole pack and verifies its sha256 before anything can read it.

        Raises DigestMismatch, IntegrityError for a wrong length, ResourceExhausted for a full
        disk, and what the repository raises.
        """
        hasher = hashlib.sha256()
        size = 0
        path = self._cache.pack_path(pack.digest)
        with self._cache.new_file(path) as file, repository.open_blob(pack) as stream:
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
        self._forget(pack)

    def discard(self, pack: Descriptor) -> None:
        """Deletes a pack whose bytes turned out to be damaged."""
        self._forget(pack)
        self._cache.pack_path(pack.digest).unlink(missing_ok=True)

    def _forget(self, pack: Descriptor) -> None:
        with self._lock:
            fd = self._fds.pop(pack.digest, None)
            if fd is not None:
                os.close(fd)

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                if fd is not None:
                    os.close(fd)
            self._fds.clear()
