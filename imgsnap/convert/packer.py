"""Packs: the new chunks of a layer, compressed on all cores, in extent order.

Whether a chunk is new is decided on one thread in extent order, and frames are appended in the
order of those decisions, so the packs do not depend on how many threads compress.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from imgsnap.convert import chunker, content
from imgsnap.convert.layer import BuiltLayer
from imgsnap.digest import ChunkId, Digest, chunk_id
from imgsnap.errors import ResourceExhausted
from imgsnap.formats.block_tree import TreeHasher
from imgsnap.formats.chunk_map import (
    ZERO_PACK,
    ChunkMap,
    ChunkPlace,
    Extent,
    PackRef,
    zero_chunk_id,
)
from imgsnap.formats.chunk_map_codec import PACKS_MAX
from imgsnap.units import BLOCK_SIZE, MIB

PACK_SIZE = 64 * MIB
"""A pack is closed after the frame that fills it. Small enough to upload several at once and to
fetch whole from a registry that ignores ranges, large enough that a manifest lists few."""

PENDING_CHUNKS = 32
"""Chunks being compressed at a time; at 256 KiB each, 8 MiB of content and as much of frames."""

_local = threading.local()


class KnownChunks(Protocol):
    """Where chunks are that need not be stored again."""

    def find(self, chunk: ChunkId) -> ChunkPlace | None: ...

    def learn(self, chunk: ChunkId, place: ChunkPlace) -> None: ...


@dataclass(frozen=True, slots=True)
class Pack:
    """A finished pack in the work directory."""

    ref: PackRef
    path: Path


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer's extent with the place of each chunk, and the packs that were written for it."""

    chunk_map: ChunkMap
    new_packs: tuple[Pack, ...]
    new_chunks: int
    new_bytes: int  # compressed


def _compress(data: bytes, level: int) -> bytes:
    """One frame; contexts are kept per thread, making one costs as much as a small chunk."""
    contexts = getattr(_local, "contexts", None)
    if contexts is None:
        contexts = _local.contexts = {}
    context = contexts.get(level)
    if context is None:
        import zstandard

        context = contexts[level] = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_content_size=True
        )
    frame: bytes = context.compress(data)
    return frame


class _PackFile:
    """A pack being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._file: IO[bytes] = path.open("wb")
        self._sha256 = hashlib.sha256()

    def append(self, frame: bytes) -> int:
        """Returns the frame's offset."""
        offset = self.size
        self._file.write(frame)
        self._sha256.update(frame)
        self.size += len(frame)
        return offset

    def finish(self) -> Pack:
        self._file.close()
        digest = Digest("sha256:" + self._sha256.hexdigest())
        return Pack(PackRef(digest, self.size), self.path)

    def abandon(self) -> None:
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


@dataclass(slots=True)
class _Row:
    """A chunk's row while its pack is not finished: `place` is known or will be."""

    chunk: ChunkId
    blocks: int
    place: ChunkPlace | None = None  # None with pack None: zeros
    pack: int | None = None  # number of the new pack
    offset: int = 0
    length: int = 0


@dataclass(slots=True)
class _Pending:
    row: _Row
    frame: Future[bytes]


@dataclass(slots=True)
class _Session:
    """Rows and packs of the layer at hand."""

    rows: list[_Row] = field(default_factory=list)
    tree: TreeHasher = field(default_factory=TreeHasher)
    own: dict[ChunkId, _Row] = field(default_factory=dict)
    pending: deque[_Pending] = field(default_factory=deque)
    packs: list[Pack] = field(default_factory=list)
    current: _PackFile | None = None


class Packer:
    """Packs layers one after the other."""

    def __init__(
        self,
        work_dir: Path,
        level: int,
        executor: Executor,
        known: KnownChunks,
        *,
        pack_size: int = PACK_SIZE,
    ) -> None:
        self._work_dir = work_dir
        self._level = level
        self._executor = executor
        self._known = known
        self._pack_size = pack_size
        self._packs_made = 0

    def pack(self, layer: BuiltLayer, tar: Path, advance: Callable[[bytes], None]) -> PackedLayer:
        """Stores the layer's new chunks; `advance` gets the extent's bytes as they are done, in
        order.

        Raises ResourceExhausted when the work directory's disk is full.
        """
        return self.pack_chunks(layer.index.diff_id, _chunks(layer, tar), advance)

    def pack_chunks(
        self, name: Digest, chunks: Iterable[bytes], advance: Callable[[bytes], None]
    ) -> PackedLayer:
        """Stores the new chunks of an extent, which its record in the chunk map calls `name`."""
        session = _Session()
        try:
            for data in chunks:
                self._take(session, data)
                advance(data)
            while session.pending:
                self._append(session, session.pending.popleft())
            self._close_pack(session)
        except OSError as error:
            raise ResourceExhausted(
                f"cannot write packs in {self._work_dir}: {error.strerror}",
                hint="choose a disk with room with --work-dir",
            ) from error
        finally:
            for pending in session.pending:
                pending.frame.cancel()
            if session.current is not None:
                session.current.abandon()
        return self._result(session, name)

    def _take(self, session: _Session, data: bytes) -> None:
        chunk = chunk_id(data)
        row = _Row(chunk, len(data) // BLOCK_SIZE)
        session.rows.append(row)
        session.tree.update(data)
        if chunk == zero_chunk_id(row.blocks) or chunk in session.own:
            return
        row.place = self._known.find(chunk)
        session.own[chunk] = row
        if row.place is not None:
            return
        frame = self._executor.submit(_compress, data, self._level)
        session.pending.append(_Pending(row, frame))
        while len(session.pending) > PENDING_CHUNKS:
            self._append(session, session.pending.popleft())

    def _append(self, session: _Session, pending: _Pending) -> None:
        frame = pending.frame.result()
        if session.current is None:
            path = self._work_dir / f"pack-{self._packs_made}"
            self._packs_made += 1
            session.current = _PackFile(path)
        row = pending.row
        row.pack = len(session.packs)
        row.offset, row.length = session.current.append(frame), len(frame)
        if session.current.size >= self._pack_size:
            self._close_pack(session)

    def _close_pack(self, session: _Session) -> None:
        if session.current is not None:
            session.packs.append(session.current.finish())
            session.current = None

    def _result(self, session: _Session, name: Digest) -> PackedLayer:
        numbers: dict[PackRef, int] = {}
        columns = array("H"), array("H"), array("I"), array("I")
        stored = [row for row in session.rows if row.pack is not None]
        for row in session.rows:
            own = session.own.get(row.chunk)
            place = _placed(own, session.packs) if own is not None else None
            number = ZERO_PACK if place is None else numbers.setdefault(place.pack, len(numbers))
            columns[0].append(row.blocks)
            columns[1].append(number)
            columns[2].append(place.offset if place else 0)
            columns[3].append(place.length if place else 0)
            if place is not None:
                self._known.learn(row.chunk, place)
        if len(numbers) > PACKS_MAX:
            raise ResourceExhausted(
                f"a layer's chunks lie in {len(numbers)} packs, over {PACKS_MAX}"
            )
        ids = b"".join(row.chunk for row in session.rows)
        extent = Extent(name, sum(columns[0]), session.tree.root, ids, *columns)
        return PackedLayer(
            ChunkMap(tuple(numbers), (extent,)),
            tuple(session.packs),
            len(stored),
            sum(row.length for row in stored),
        )


def _placed(row: _Row, packs: list[Pack]) -> ChunkPlace | None:
    if row.pack is None:
        return row.place
    return ChunkPlace(packs[row.pack].ref, row.offset, row.length)


def _chunks(layer: BuiltLayer, tar: Path) -> Iterator[bytes]:
    """The padded bytes of each chunk of the extent."""
    fd = os.open(tar, os.O_RDONLY)
    try:
        for planned in chunker.plan(layer.index.files, layer.index.rules):
            parts: list[bytes] = []
            for piece in planned.pieces:
                parts += content.read(layer.contents[piece.file], fd, piece.offset, piece.length)
                parts.append(bytes(-piece.length % BLOCK_SIZE))
            data = b"".join(parts)
            assert len(data) == planned.blocks * BLOCK_SIZE
            yield data
    finally:
        os.close(fd)
