"""The SHA-256 of each block of layers' extents: what hash trees are made of (formats/verity.py).

They are a function of the extent, whatever image it is in, so they are kept as a blob of the
layer's artefact, 32 bytes for each block in order. They come from the chunks as a layer is packed;
from the artefact of a layer that was converted with them before; else from the packs in the target,
each streamed once and every chunk verified. Here each layer's are a file: memory does not grow with
the image.
"""

import bisect
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from imgsnap.blockstore.pack_stream import plan, read_pack
from imgsnap.blockstore.verity_tree import TreeFile
from imgsnap.convert.artifact import LayerArtifact, publish_artifact
from imgsnap.convert.chunk_maps import merge_chunk_maps
from imgsnap.convert.progress import Progress
from imgsnap.digest import Digest, digest_hex
from imgsnap.errors import DigestMismatch, IntegrityError, NotFound, ResourceExhausted
from imgsnap.formats.verity import HASH_BYTES, block_hash, block_hashes
from imgsnap.oci import media_types
from imgsnap.oci.repository import Descriptor, Repository, WritableRepository
from imgsnap.units import BLOCK_SIZE, MIB

LABEL = "verity"
"""What progress calls the reading back of layers and the storing of the tree."""


class BlockHashes:
    """The hashes of layers, by diffID. Methods raise ResourceExhausted when the disk is full."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: set[Digest] = set()

    def path(self, diff_id: Digest) -> Path:
        return self._directory / f"hashes-{digest_hex(diff_id)}"

    @contextmanager
    def taking(self, diff_id: Digest) -> Iterator[Callable[[bytes], None]]:
        """Takes an extent's bytes, whole blocks in order, until the context is left."""
        with self._on_disk(), self.path(diff_id).open("wb") as file:

            def take(data: bytes) -> None:
                file.write(b"".join(block_hashes(data)))

            yield take
        self._known.add(diff_id)

    def obtain(
        self, target: WritableRepository, artifacts: Sequence[LayerArtifact], progress: Progress
    ) -> None:
        """Gets the hashes of converted layers that are not known yet. Artefacts that lack them are
        published anew with them.

        Raises DigestMismatch for damage, and what the repository raises.
        """
        unknown = [item for item in artifacts if item.index.diff_id not in self._known]
        with self._on_disk():
            lacking = [item for item in unknown if not self._fetched(target, item)]
            if lacking:
                self._read_back(target, lacking, progress)
        for item in lacking:
            hashes = self.store(target, item.index.diff_id)
            publish_artifact(target, item.index, item.chunk_map, hashes)

    def store(self, target: WritableRepository, diff_id: Digest) -> Descriptor | None:
        """Stores a layer's hashes as a blob; None of an extent without blocks."""
        path = self.path(diff_id)
        with path.open("rb") as file:
            digest = Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
        size = path.stat().st_size
        if not size:
            return None
        descriptor = Descriptor(media_types.BLOCK_HASHES, digest, size)
        target.put_blob(descriptor, path)
        return descriptor

    def give(self, diff_id: Digest, tree: TreeFile, block: int) -> None:
        """Gives a layer's hashes to a tree, as those of the blocks from `block` on."""
        with self.path(diff_id).open("rb") as file:
            while hashes := file.read(MIB):
                tree.put_hashes(block, hashes)
                block += len(hashes) // HASH_BYTES

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceExhausted(
                f"cannot write block hashes in {self._directory}: {error.strerror}",
                hint="choose a disk with room with --work-dir",
            ) from error

    def _fetched(self, repository: Repository, artifact: LayerArtifact) -> bool:
        """Whether the artefact has the hashes; an extent without blocks needs none."""
        diff_id, descriptor = artifact.index.diff_id, artifact.hashes
        if descriptor is None and artifact.index.extent_blocks:
            return False
        with self.path(diff_id).open("wb") as file:
            try:
                if descriptor is not None:
                    _copy(repository, descriptor, file)
            except NotFound:
                return False
        self._known.add(diff_id)
        return True

    def _read_back(
        self, repository: Repository, artifacts: Sequence[LayerArtifact], progress: Progress
    ) -> None:
        bases, end = [], 0
        for artifact in artifacts:
            bases.append(end)
            end += artifact.index.extent_blocks
            self.path(artifact.index.diff_id).write_bytes(b"")
        wanted, zeros = plan(merge_chunk_maps([item.chunk_map for item in artifacts]), bases)
        progress.stage(LABEL, "read back", sum(pack.size for pack in wanted))

        def put(block: int, hashes: bytes) -> None:
            number = bisect.bisect(bases, block) - 1
            fd = os.open(self.path(artifacts[number].index.diff_id), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(fd, hashes, (block - bases[number]) * HASH_BYTES)
            finally:
                os.close(fd)

        def take(content: bytes, blocks: Sequence[int]) -> None:
            hashes = b"".join(block_hashes(content))
            for block in blocks:
                put(block, hashes)

        for pack, frames in wanted.items():
            read_pack(repository, pack, frames, take, lambda size: progress.advance(LABEL, size))
        zero = block_hash(bytes(BLOCK_SIZE))
        for run in zeros:
            put(run.block, zero * run.blocks)
        self._known.update(artifact.index.diff_id for artifact in artifacts)


def _copy(repository: Repository, descriptor: Descriptor, file: IO[bytes]) -> None:
    """A blob, verified; no more than its size of it. Raises DigestMismatch, IntegrityError."""
    sha256, left = hashlib.sha256(), descriptor.size
    with repository.open_blob(descriptor) as stream:
        while data := stream.read(MIB):
            left -= len(data)
            if left < 0:
                break
            sha256.update(data)
            file.write(data)
    if left:
        raise IntegrityError(
            f"{repository.name}: blob {descriptor.digest} has not its {descriptor.size} bytes"
        )
    got = "sha256:" + sha256.hexdigest()
    if got != descriptor.digest:
        raise DigestMismatch(f"{repository.name}: blob", descriptor.digest, got)
