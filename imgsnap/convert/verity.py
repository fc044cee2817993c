"""The hash tree of a snapshot's device, made while it is converted (formats/verity.py)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imgsnap.blockstore.verity_tree import TreeFile, read_exactly
from imgsnap.convert.artifact import pack_descriptor
from imgsnap.convert.block_hashes import LABEL, BlockHashes
from imgsnap.convert.chunker import pieces
from imgsnap.convert.packer import PackedLayer, Packer
from imgsnap.convert.progress import Progress
from imgsnap.digest import digest_from_raw
from imgsnap.errors import ResourceExhausted, Unsupported
from imgsnap.formats.chunk_map import ChunkMap
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import BLOCKS_MAX, DeviceExtent, ExtentConfig, VerityConfig
from imgsnap.formats.verity import VerityLayout
from imgsnap.oci.repository import WritableRepository
from imgsnap.units import BLOCK_SIZE


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
                    self.hashes.give(extent.diff_id, tree, extent.base_block)
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
