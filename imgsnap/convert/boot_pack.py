"""Building and publishing a boot pack: the blocks of recorded starts, in reading order."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.blockstore.boot_choice import BootPack
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.convert.artifact import EMPTY, put_empty
from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import IntegrityError, InvalidArgument, ResourceExhausted
from imgsnap.formats import block_tree, boot_pack
from imgsnap.formats.boot_pack import BootExtent, BootFrame, BootTable, Run
from imgsnap.formats.frame import compress
from imgsnap.formats.trace import Trace, merged
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageManifest, raw_manifest
from imgsnap.oci.repository import Descriptor, WritableRepository
from imgsnap.units import BLOCK_SIZE, MIB

FRAME_BLOCKS = 128
"""512 KiB: see docs/adr/0008."""
LEVEL = 19
"""Compressed once, sent at every cold start."""
_READ = 4 * MIB

Block = tuple[str, int]
"""(extent id, block)."""


@dataclass(frozen=True, slots=True)
class Built:
    """A boot pack in a file."""

    path: Path
    table: BootTable
    size: int
    ignored: int  # blocks of the traces that this snapshot does not have


def plan(order: Sequence[Block], frame_blocks: int = FRAME_BLOCKS) -> list[list[tuple[Block, int]]]:
    """Frames of (first block, count) runs: the order is kept from frame to frame, and inside a
    frame, which arrives as a whole, blocks are sorted, so that they compress and prove best."""
    frames = []
    for start in range(0, len(order), frame_blocks):
        runs: list[tuple[Block, int]] = []
        for extent, block in sorted(order[start : start + frame_blocks]):
            if runs and runs[-1][0] == (extent, block - runs[-1][1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append(((extent, block), 1))
        frames.append(runs)
    return frames


def build(snapshot: Snapshot, reader: BlockReader, traces: Iterable[Trace], path: Path) -> Built:
    """Writes the pack of these traces to `path`.

    Reads the touched extents whole: their block trees are made from verified chunks, and must have
    the roots that the chunk map states. Raises InvalidArgument when the snapshot has none of the
    blocks, IntegrityError, and what reading raises.
    """
    bases = {
        extent.extent_id: extent.base_block for extent in reversed(snapshot.config.device_extents)
    }
    sizes = {extent.extent_id: extent.blocks for extent in snapshot.config.device_extents}
    order = list(merged(traces, boot_pack.BLOCKS_MAX))
    known = [(extent, block) for extent, block in order if block < sizes.get(extent, 0)]
    if not known:
        raise InvalidArgument(
            "the traces name no block of this snapshot",
            hint="record one of it: imgsnap trace REF -o FILE",
        )
    trees = _Trees(snapshot, reader, bases, dict.fromkeys(extent for extent, _ in known))
    numbers = {extent: number for number, extent in enumerate(trees.levels)}
    frames: list[BootFrame] = []
    nodes: dict[str, list[block_tree.Node]] = {extent: [] for extent in numbers}
    content_path = path.with_suffix(".frames")
    try:
        with content_path.open("wb") as file:
            for runs in plan(known):
                data = b"".join(
                    reader.read((bases[extent] + block) * BLOCK_SIZE, count * BLOCK_SIZE)
                    for (extent, block), count in runs
                )
                raw = compress(data, LEVEL)
                file.write(raw)
                hashes: list[bytes] = []
                for (extent, block), count in runs:
                    hashes += trees.run(extent, block, count)
                    nodes[extent] += block_tree.cover(block, count)
                own = tuple(Run(numbers[extent], block, count) for (extent, block), count in runs)
                frames.append(BootFrame(len(raw), own, tuple(hashes)))
        extents = tuple(
            BootExtent(extent, sizes[extent], tuple(block_tree.prove(levels, nodes[extent])))
            for extent, levels in trees.levels.items()
        )
        table = BootTable(extents, tuple(frames))
        with path.open("wb") as file, content_path.open("rb") as content:
            file.write(boot_pack.encode(table))
            shutil.copyfileobj(content, file, MIB)
    except OSError as error:
        raise ResourceExhausted(
            f"cannot write {path}: {error.strerror}", hint="choose another disk with --work-dir"
        ) from error
    finally:
        content_path.unlink(missing_ok=True)
    return Built(path, table, path.stat().st_size, len(order) - len(known))


class _Trees:
    """The block trees of the touched extents, checked against the chunk map's roots."""

    def __init__(
        self,
        snapshot: Snapshot,
        reader: BlockReader,
        bases: Mapping[str, int],
        extents: Iterable[str],
    ) -> None:
        stated = {extent.id: extent for extent in snapshot.chunk_map.extents}
        self.levels: dict[str, list[list[bytes]]] = {}
        for extent_id in extents:
            extent = stated[extent_id]
            leaves = [
                leaf
                for data in _extent_bytes(reader, bases[extent_id], extent.total_blocks)
                for leaf in block_tree.leaves(data)
            ]
            levels = block_tree.build(leaves)
            if levels[-1][0] != extent.block_root:
                raise IntegrityError(
                    f"the block root of extent {extent.diff_id} is not that of its chunks",
                    hint="convert the image again",
                )
            self.levels[extent_id] = levels

    def run(self, extent: str, block: int, count: int) -> Iterator[bytes]:
        """The nodes that cover a run."""
        for level, index in block_tree.cover(block, count):
            yield self.levels[extent][level][index]


def _extent_bytes(reader: BlockReader, base: int, blocks: int) -> Iterator[bytes]:
    offset, end = base * BLOCK_SIZE, (base + blocks) * BLOCK_SIZE
    while offset < end:
        length = min(_READ, end - offset)
        yield reader.read(offset, length)
        offset += length


def publish(
    target: WritableRepository, snapshot: Digest, built: Built, name: str, *, default: bool
) -> BootPack:
    """Stores a pack as a referrer of the snapshot. The newest of a name is the one that counts."""
    sha256 = hashlib.sha256()
    with built.path.open("rb") as file:
        while data := file.read(MIB):
            sha256.update(data)
    blob = Descriptor(media_types.BOOT_PACK, Digest("sha256:" + sha256.hexdigest()), built.size)
    target.put_blob(blob, built.path)
    put_empty(target)
    subject = target.manifest(snapshot).descriptor
    created = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    pack = BootPack(name, blob, default, created, snapshot)
    raw = raw_manifest(
        ImageManifest(
            config=Descriptor(media_types.OCI_EMPTY, sha256_digest(EMPTY), len(EMPTY)),
            layers=(blob,),
            subject=Descriptor(subject.media_type, subject.digest, subject.size),
            artifact_type=media_types.ARTIFACT_BOOT_PACK,
            annotations=pack.annotations(),
        )
    )
    target.put_manifest(raw, subject=snapshot)
    return BootPack(name, blob, default, created, raw.descriptor.digest)


def optimize(
    snapshot: Snapshot,
    reader: BlockReader,
    traces: Iterable[Trace],
    target: WritableRepository,
    name: str,
    work_dir: Path,
    *,
    default: bool,
) -> tuple[BootPack, Built]:
    """Builds and publishes; returns what was published. The built file is gone afterwards."""
    with TemporaryDirectory(dir=work_dir, prefix="imgsnap-optimize-") as directory:
        built = build(snapshot, reader, traces, Path(directory) / "boot")
        digest = snapshot.manifest.digest
        return publish(target, digest, built, name, default=default), built
