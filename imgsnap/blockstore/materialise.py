"""A whole snapshot as one local file, every byte verified: for checking and exporting.

Unlike the block reader this streams each pack once, in order, and so also proves that the packs
themselves are what the manifest says.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.digest import ChunkId, chunk_id
from imgsnap.errors import DigestMismatch, FormatError, IntegrityError, ResourceExhausted
from imgsnap.formats import frame
from imgsnap.formats.block_tree import TreeHasher
from imgsnap.formats.chunk_map import PackRef
from imgsnap.oci import media_types
from imgsnap.oci.repository import ByteStream, Descriptor
from imgsnap.units import BLOCK_SIZE, MIB


class _Wanted(NamedTuple):
    """A frame of a pack, and where on the device its content goes."""

    offset: int
    length: int
    size: int
    chunk: ChunkId
    device_offsets: list[int]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was verified; sizes in bytes."""

    packs: int
    pack_bytes: int
    chunks: int  # distinct, zeros not counted
    zero_chunks: int


def materialise(
    snapshot: Snapshot, path: Path, advance: Callable[[int], None] = lambda size: None
) -> Verified:
    """Writes the device to `path` (sparse), verifying pack and chunk digests and block roots.

    Raises DigestMismatch or FormatError naming what is damaged, ResourceExhausted on a full
    disk, and what the repository raises.
    """
    wanted, zero_chunks = _plan(snapshot)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, snapshot.size)
            os.pwrite(fd, os.pread(snapshot.metadata.fileno(), snapshot.metadata_size, 0), 0)
            for pack, frames in wanted.items():
                _read_pack(snapshot, pack, frames, fd, advance)
            _check_block_roots(snapshot, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {path}: {error.strerror}") from error
    return Verified(
        packs=len(wanted),
        pack_bytes=sum(pack.size for pack in wanted),
        chunks=sum(map(len, wanted.values())),
        zero_chunks=zero_chunks,
    )


def _check_block_roots(snapshot: Snapshot, fd: int) -> None:
    """Chunk ids and block roots must tell of the same bytes, or boot packs would bring others."""
    for extent, config in zip(snapshot.chunk_map.extents, snapshot.config.extents, strict=True):
        tree = TreeHasher()
        offset = config.base_block * BLOCK_SIZE
        end = offset + config.blocks * BLOCK_SIZE
        while offset < end:
            data = os.pread(fd, min(MIB, end - offset), offset)
            tree.update(data)
            offset += len(data)
        if tree.root != extent.block_root:
            what = f"block root of extent {extent.diff_id}"
            raise DigestMismatch(what, extent.block_root.hex(), tree.root.hex())


def _plan(snapshot: Snapshot) -> tuple[dict[PackRef, list[_Wanted]], int]:
    """The frames to read from each pack, in order of offset, and the number of zero chunks."""
    found: dict[PackRef, dict[int, _Wanted]] = {pack: {} for pack in snapshot.chunk_map.packs}
    zeros = 0
    for extent, config in zip(snapshot.chunk_map.extents, snapshot.config.extents, strict=True):
        block = config.base_block
        for row, blocks in enumerate(extent.blocks):
            place = snapshot.chunk_map.place(extent, row)
            if place is None:
                zeros += 1
            else:
                chunk, size = extent.chunk_id(row), blocks * BLOCK_SIZE
                item = found[place.pack].setdefault(
                    place.offset, _Wanted(place.offset, place.length, size, chunk, [])
                )
                if (item.chunk, item.length, item.size) != (chunk, place.length, size):
                    raise FormatError(
                        "chunk map", f"pack {place.pack.digest}", place.offset, "two chunks overlap"
                    )
                item.device_offsets.append(block * BLOCK_SIZE)
            block += blocks
    return {pack: [items[k] for k in sorted(items)] for pack, items in found.items()}, zeros


def _read_pack(
    snapshot: Snapshot,
    pack: PackRef,
    frames: list[_Wanted],
    fd: int,
    advance: Callable[[int], None],
) -> None:
    sha256 = hashlib.sha256()
    descriptor = Descriptor(media_types.PACK, pack.digest, pack.size)
    with snapshot.repository.open_blob(descriptor) as stream:
        for item, raw in _frames(stream, frames, sha256.update, advance):
            _write(item, raw, pack, fd)
    if "sha256:" + sha256.hexdigest() != pack.digest:
        raise DigestMismatch("pack", pack.digest, "sha256:" + sha256.hexdigest())


def _frames(
    stream: ByteStream,
    frames: list[_Wanted],
    update: Callable[[bytes], None],
    advance: Callable[[int], None],
) -> Iterator[tuple[_Wanted, bytes]]:
    """Each frame's bytes, cut from the stream, which is read to its end."""
    buffer, start, number = bytearray(), 0, 0
    while data := stream.read(MIB):
        update(data)
        advance(len(data))
        buffer += data
        while number < len(frames):
            item = frames[number]
            first = item.offset - start
            if first + item.length > len(buffer):
                break
            yield item, bytes(buffer[first : first + item.length])
            number += 1
        keep = frames[number].offset if number < len(frames) else start + len(buffer)
        drop = min(max(keep - start, 0), len(buffer))
        del buffer[:drop]
        start += drop
    if number < len(frames):
        raise IntegrityError(f"a pack ends before its frame at {frames[number].offset}")


def _write(item: _Wanted, raw: bytes, pack: PackRef, fd: int) -> None:
    record = f"pack {pack.digest}: frame at {item.offset}"
    content = frame.decompress_exact(raw, item.size, record=record)
    got = chunk_id(content)
    if got != item.chunk:
        raise DigestMismatch(record, item.chunk.hex(), got.hex())
    for offset in item.device_offsets:
        os.pwrite(fd, content, offset)
