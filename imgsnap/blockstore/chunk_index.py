"""The converter's chunk index: chunk id to the place where a repository holds it.

A cache of what the repository's layer artefacts say, kept in RocksDB so that a store of many
millions of chunks costs no memory. It can be deleted at any time and is rebuilt from the
artefacts; it is never consulted by readers.
"""

import contextlib
import fcntl
import logging
import os
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from imgsnap.digest import ChunkId, Digest, digest_from_raw, digest_to_raw
from imgsnap.errors import Busy
from imgsnap.formats.chunk_map import ChunkMap, ChunkPlace, PackRef

log = logging.getLogger(__name__)

_PLACE = struct.Struct("<32sQII")
"""0 32 pack sha256 · 32 8 u64 pack size · 40 4 u32 offset · 44 4 u32 length"""
assert _PLACE.size == 48

_CHUNK = b"c"  # + chunk id -> _PLACE
_SEEN = b"a"  # + name of a layer artefact -> b""
_FORMAT = b"f2"  # a database without this key is of another version and is rebuilt


class ChunkIndex:
    """One repository's chunks. Holds an exclusive lock while open, waiting for it: RocksDB
    allows one process. Raises Busy when something other than imgsnap has the database open.
    """

    def __init__(self, path: Path) -> None:
        from rocksdict import AccessType, Options, Rdict

        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(
            path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        self._acquire()
        options = Options(raw_mode=True)  # the default mode would unpickle what it reads
        options.create_if_missing(True)
        options.set_max_open_files(64)
        options.set_keep_log_file_num(1)
        try:
            self._db: Any = self._open(Rdict, path, options, AccessType)
        except BaseException:
            os.close(self._lock)
            raise

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another conversion into the same target")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    @staticmethod
    def _open(rdict: Any, path: Path, options: Any, access: Any) -> Any:
        """A damaged or foreign database is thrown away: everything in it can be had again."""
        try:
            db = rdict(str(path), options, access_type=access.read_write())
            if db.get(_FORMAT) is not None or (db.get(_SEEN) is None and _is_empty(db)):
                db[_FORMAT] = b""
                return db
            db.close()
        except Exception as error:
            if "lock" in str(error).lower():
                raise Busy(f"{path}: {error}") from error
        rdict.destroy(str(path), options)
        db = rdict(str(path), options, access_type=access.read_write())
        db[_FORMAT] = b""
        return db

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._db.close()
            os.close(self._lock)

    def get(self, chunk: ChunkId) -> ChunkPlace | None:
        raw = self._db.get(_CHUNK + chunk)
        if raw is None:
            return None
        pack, size, offset, length = _PLACE.unpack(raw)
        return ChunkPlace(PackRef(digest_from_raw(pack), size), offset, length)

    def has_artifact(self, name: str) -> bool:
        """Whether the layer artefact of this name has been taken in."""
        return self._db.get(_SEEN + name.encode()) is not None

    def add(self, chunk_map: ChunkMap, name: str) -> None:
        """Takes in the chunks of the layer artefact `name`, all or none of them."""
        from rocksdict import WriteBatch

        batch = WriteBatch(raw_mode=True)
        for chunk, place in _stored(chunk_map):
            key = _CHUNK + chunk
            raw = _PLACE.pack(
                digest_to_raw(place.pack.digest), place.pack.size, place.offset, place.length
            )
            batch.put(key, raw)
        batch.put(_SEEN + name.encode(), b"")
        self._db.write(batch)

    def forget_packs(self, packs: Collection[Digest]) -> None:
        """Drops every chunk of packs that the repository no longer has, and all knowledge of
        which artefacts were taken in, so that the next conversion reads them again."""
        gone = {digest_to_raw(pack) for pack in packs}
        stale = [key for key, value in self._db.items() if value[:32] in gone or key[:1] == _SEEN]
        for key in stale:
            del self._db[key]


def _is_empty(db: Any) -> bool:
    return next(iter(db.keys()), None) is None


def _stored(chunk_map: ChunkMap) -> Iterator[tuple[ChunkId, ChunkPlace]]:
    for extent in chunk_map.extents:
        for row in range(len(extent)):
            place = chunk_map.place(extent, row)
            if place is not None:
                yield extent.chunk_id(row), place
