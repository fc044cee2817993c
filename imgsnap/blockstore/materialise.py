"""A whole snapshot as one local file, every byte verified: for checking and exporting.

Unlike the block reader this streams each pack once, in order, and so also proves that the packs
themselves are what the manifest says.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.pack_stream import plan, read_pack
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.errors import DigestMismatch, ResourceExhausted
from imgsnap.formats.block_tree import TreeHasher
from imgsnap.units import BLOCK_SIZE, MIB


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
    bases = [extent.base_block for extent in snapshot.config.device_extents]
    wanted, zeros = plan(snapshot.chunk_map, bases)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

        def write(content: bytes, blocks: Sequence[int]) -> None:
            for block in blocks:
                os.pwrite(fd, content, block * BLOCK_SIZE)

        try:
            os.ftruncate(fd, snapshot.size)
            os.pwrite(fd, os.pread(snapshot.metadata.fileno(), snapshot.metadata_size, 0), 0)
            for pack, frames in wanted.items():
                read_pack(snapshot.repository, pack, frames, write, advance)
            _check_block_roots(snapshot, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise ResourceExhausted(f"cannot write {path}: {error.strerror}") from error
    return Verified(
        packs=len(wanted),
        pack_bytes=sum(pack.size for pack in wanted),
        chunks=sum(map(len, wanted.values())),
        zero_chunks=len(zeros),
    )


def _check_block_roots(snapshot: Snapshot, fd: int) -> None:
    """Chunk ids and block roots must tell of the same bytes, or boot packs would bring others."""
    extents = zip(snapshot.chunk_map.extents, snapshot.config.device_extents, strict=True)
    for extent, stated in extents:
        tree = TreeHasher()
        offset = stated.base_block * BLOCK_SIZE
        end = offset + stated.blocks * BLOCK_SIZE
        while offset < end:
            data = os.pread(fd, min(MIB, end - offset), offset)
            tree.update(data)
            offset += len(data)
        if tree.root != extent.block_root:
            what = f"block root of extent {extent.diff_id}"
            raise DigestMismatch(what, extent.block_root.hex(), tree.root.hex())
