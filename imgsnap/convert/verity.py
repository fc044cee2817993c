"""The hash tree of a snapshot's device, made while it is converted.

The hashes of layers that are converted now are taken as their chunks are packed. Layers that were
converted before are read back from the target, each pack once and every chunk verified. A file in
the work directory has them all, 32 bytes for each 4096 of the extents; memory does not grow with
the image.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from imgsnap.blockstore.pack_stream import plan, read_pack
from imgsnap.blockstore.verity_tree import TreeFile, read_exactly
from imgsnap.convert.artifact import LayerArtifact, pack_descriptor
from imgsnap.convert.chunk_maps import merge_chunk_maps
from imgsnap.convert.chunker import pieces
from imgsnap.convert.packer import PackedLayer, Packer
from imgsnap.convert.progress import Progress
from imgsnap.digest import Digest, digest_from_raw
from imgsnap.errors import ResourceExhausted, Unsupported
from imgsnap.formats.chunk_map import ChunkMap
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import BLOCKS_MAX, DeviceExtent, ExtentConfig, VerityConfig
from imgsnap.formats.verity import HASH_BYTES, VerityLayout, block_hash, block_hashes
from imgsnap.oci.repository import Repository, WritableRepository
from imgsnap.units import BLOCK_SIZE

LABEL = "verity"
"""What progress calls the reading back of layers and the storing of the tree."""


@dataclass(frozen=True, slots=True)
class SealedDevice:
    """A hash tree that the target has."""

    config: VerityConfig
    chunk_map: ChunkMap  # of its one extent


class Seal(Protocol):
    """Makes the tree of a device: the metadata region, and the layers' extents behind it."""

    def __call__(
        self, metadata: bytes, uuid: bytes, extents: Sequence[ExtentConfig]
    ) -> SealedDevice: ...


class BlockHashes:
    """The hashes of layers' blocks in one file; a context manager. Methods raise OSError."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._places: dict[Digest, tuple[int, int]] = {}  # first hash of the file, and how many
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def __contains__(self, diff_id: Digest) -> bool:
        return diff_id in self._places

    def taker(self, diff_id: Digest, blocks: int) -> Callable[[bytes], None]:
        """Takes an extent's bytes, whole blocks in order; all of them must come."""
        place = self._claim(blocks)
        at = place
        self._places[diff_id] = place, blocks

        def take(data: bytes) -> None:
            nonlocal at
            at += self._put(at, b"".join(block_hashes(data)))

        return take

    def read_back(
        self, repository: Repository, artifacts: Sequence[LayerArtifact], progress: Progress
    ) -> None:
        """Hashes the extents of layers that the repository has converted.

        Raises DigestMismatch for damage, and what the repository raises.
        """
        maps = [artifact.chunk_map for artifact in artifacts]
        extents = [extent for chunk_map in maps for extent in chunk_map.extents]
        bases = [self._claim(extent.total_blocks) for extent in extents]
        wanted, zeros = plan(merge_chunk_maps(maps), bases)
        progress.stage(LABEL, "read back", sum(pack.size for pack in wanted))

        def take(content: bytes, blocks: Sequence[int]) -> None:
            hashes = b"".join(block_hashes(content))
            for block in blocks:
                self._put(block, hashes)

        for pack, frames in wanted.items():
            read_pack(repository, pack, frames, take, lambda size: progress.advance(LABEL, size))
        zero = block_hash(bytes(BLOCK_SIZE))
        for run in zeros:
            self._put(run.block, zero * run.blocks)
        for extent, base in zip(extents, bases, strict=True):
            self._places[extent.diff_id] = base, extent.total_blocks

    def copy(self, diff_id: Digest, tree: TreeFile, block: int) -> None:
        """Gives a layer's hashes to a tree, as those of blocks from `block` on."""
        first, count = self._places[diff_id]
        tree.put_hash_file(block, self._fd, first, count)

    def _claim(self, blocks: int) -> int:
        first = self._end
        self._end += blocks
        return first

    def _put(self, place: int, hashes: bytes) -> int:
        os.pwrite(self._fd, hashes, place * HASH_BYTES)
        return len(hashes) // HASH_BYTES


@dataclass(frozen=True, slots=True)
class Sealer:
    """Seals devices whose layers' hashes are known; a `Seal`."""

    hashes: BlockHashes
    packer: Packer
    rules: Rules
    target: WritableRepository
    work_dir: Path
    progress: Progress

    def __call__(
        self, metadata: bytes, uuid: bytes, extents: Sequence[ExtentConfig]
    ) -> SealedDevice:
        """Builds the tree and stores its chunks in packs of its own.

        Raises ResourceExhausted when the work directory is full, and what the target raises.
        """
        blocks = len(metadata) // BLOCK_SIZE + sum(extent.blocks for extent in extents)
        whole = blocks + VerityLayout(blocks).blocks
        if whole > BLOCKS_MAX:
            raise Unsupported(
                f"with its hash tree the image needs {whole} blocks, over {BLOCKS_MAX}"
            )
        path = self.work_dir / "verity-area"
        try:
            with TreeFile(path, blocks) as tree:
                tree.put_data(0, metadata)
                for extent in extents:
                    self.hashes.copy(extent.diff_id, tree, extent.base_block)
                root_hash = tree.finish(uuid)
            packed = self._pack(path, root_hash)
        except OSError as error:
            raise ResourceExhausted(
                f"cannot write the hash tree in {self.work_dir}: {error.strerror}",
                hint="choose a disk with room with --work-dir",
            ) from error
        tree_extent = packed.chunk_map.extents[0]
        place = DeviceExtent(tree_extent.id, blocks, tree_extent.total_blocks)
        return SealedDevice(VerityConfig(root_hash, place), packed.chunk_map)

    def _pack(self, path: Path, root_hash: str) -> PackedLayer:
        size = path.stat().st_size
        self.progress.stage(LABEL, "pack", size)
        with path.open("rb") as file:
            packed = self.packer.pack_chunks(
                digest_from_raw(bytes.fromhex(root_hash)),
                _chunks(file.fileno(), size, self.rules),
                lambda data: self.progress.advance(LABEL, len(data)),
            )
        for pack in packed.new_packs:
            self.target.put_blob(pack_descriptor(pack.ref), pack.path)
            pack.path.unlink(missing_ok=True)
        self.progress.done(LABEL, f"{packed.new_bytes >> 10} KiB new")
        return packed


def _chunks(fd: int, size: int, rules: Rules) -> Iterator[bytes]:
    """The area is cut as a large file is."""
    for offset, length in pieces(size, rules):
        yield read_exactly(fd, offset, length)
