"""The one place where the steps of a conversion are wired together.

Per layer: look the artefact up; if there is none, fetch + verify + decompress (ingest pool),
index, then pack in layer order (compression pool) and publish (transfer pool). Per image: merge
the layer indexes, emit the EROFS metadata, publish the snapshot manifest last.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert import ingest
from imgsnap.convert.artifact import (
    LayerArtifact,
    find_artifact,
    layer_tag,
    missing_pack,
    pack_descriptor,
    publish_artifact,
    put_empty,
)
from imgsnap.convert.block_hashes import BlockHashes
from imgsnap.convert.dedupe import Known, artifact_name
from imgsnap.convert.ingest import LayerSource
from imgsnap.convert.layer import BuiltLayer
from imgsnap.convert.limits import Limits
from imgsnap.convert.packer import PackedLayer, Packer
from imgsnap.convert.progress import Progress
from imgsnap.convert.snapshot import Snapshot, build_snapshot, check_extents
from imgsnap.convert.source import SourceImage
from imgsnap.convert.verity import Sealer
from imgsnap.digest import Digest
from imgsnap.errors import NotFound, ResourceExhausted
from imgsnap.formats.chunk_map import PackRef
from imgsnap.formats.rules import Rules
from imgsnap.oci.repository import Descriptor, Repository, WritableRepository
from imgsnap.oci.transfer import copy_blob

TRANSFERS = 4
"""Uploads and look-ups at a time; more only adds connections on the links measured."""


ABANDON_AFTER_S = 2.0
"""How long a conversion that has failed waits for its workers to notice."""


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert; nothing here but `rules`, `level` and `verity` changes a published byte."""

    work_dir: Path
    rules: Rules = field(default_factory=Rules)
    level: int = 3
    jobs: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    limits: Limits = field(default_factory=Limits)
    strip_root: bool = False  # take absolute names in tars as relative to the root
    verity: bool = False  # add a hash tree


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What became of one layer; sizes in bytes."""

    diff_id: Digest
    reused: bool
    compressed: int  # the source blob
    extent: int
    chunks: int
    new_chunks: int
    stored: int  # new pack bytes


@dataclass(frozen=True, slots=True)
class ConvertedImage:
    """One platform's snapshot, published."""

    snapshot: Snapshot
    platform: str
    layers: tuple[LayerReport, ...]
    seconds: float
    flatten_cpu_s: float


@dataclass(frozen=True, slots=True)
class _Publishing:
    """A packed layer on its way into the target."""

    layer: LayerSource
    packed: PackedLayer
    artifact: Future[LayerArtifact]


class Cancelled(BaseException):
    """Raised inside a worker whose conversion has been given up."""


class Conversion:
    """Converts images into one target; holds the work directory and the thread pools.

    Use as a context manager. Layers that were finished before an error or an interrupt stay in
    the target, so that a rerun continues after them.
    """

    def __init__(
        self,
        target: WritableRepository,
        index: ChunkIndex,
        options: Options,
        progress: Progress,
        *,
        reuse: Sequence[Repository] = (),
    ) -> None:
        self._target = target
        self._index = index
        self._options = options
        self._progress = progress
        self._reuse = reuse
        self._known = Known(index, self._obtain_pack)
        self._stop = threading.Event()
        self._running: list[Future[Any]] = []
        self._taking = threading.Lock()
        self._prepared = False

    def __enter__(self) -> Self:
        work_dir = self._options.work_dir
        try:
            work_dir.mkdir(parents=True, exist_ok=True)
            self._work = TemporaryDirectory(
                dir=work_dir, prefix="imgsnap-convert-", ignore_cleanup_errors=True
            )
        except OSError as error:
            raise ResourceExhausted(
                f"cannot work in {work_dir}: {error.strerror}",
                hint="choose another directory with --work-dir",
            ) from error
        jobs = self._options.jobs
        self._ingest = ThreadPoolExecutor(jobs, thread_name_prefix="imgsnap-ingest")
        self._compress = ThreadPoolExecutor(jobs, thread_name_prefix="imgsnap-zstd")
        self._transfer = ThreadPoolExecutor(TRANSFERS, thread_name_prefix="imgsnap-transfer")
        work = Path(self._work.name)
        self._packer = Packer(work, self._options.level, self._compress, self._known)
        self._hashes = BlockHashes(work)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for pool in (self._ingest, self._compress, self._transfer):
            pool.shutdown(wait=False, cancel_futures=True)
        # After an error a worker may hang on a registry that has stalled, for as long as the
        # transport is patient. It is left behind: whatever it writes goes to a deleted file.
        failed = exc_info[0] is not None
        wait(self._running, timeout=ABANDON_AFTER_S if failed else None)
        self._work.cleanup()

    def convert(self, source: Repository, image: SourceImage) -> ConvertedImage:
        """Converts one image and publishes its snapshot by digest, untagged.

        Raises IntegrityError, LimitExceeded, ResourceExhausted, Unsupported for more layers than a
        snapshot can have, and what repositories raise.
        """
        check_extents(len(image.layers), verity=self._options.verity)
        started = time.monotonic()
        artifacts: dict[Digest, LayerArtifact] = {}
        reports: dict[Digest, LayerReport] = {}
        layers = {layer.diff_id: layer for layer in image.layers}
        self._find_converted(layers, artifacts, reports)
        missing = [layer for layer in layers.values() if layer.diff_id not in artifacts]
        self._convert_layers(source, missing, artifacts, reports)
        seal = self._sealer(artifacts) if self._options.verity else None
        cpu = time.process_time()
        snapshot = build_snapshot(
            self._target, image, [artifacts[layer.diff_id] for layer in image.layers], seal
        )
        return ConvertedImage(
            snapshot,
            str(image.platform),
            tuple(reports[layer.diff_id] for layer in image.layers),
            time.monotonic() - started,
            time.process_time() - cpu,
        )

    def _sealer(self, artifacts: dict[Digest, LayerArtifact]) -> Sealer:
        """Gets the block hashes of layers that were converted before."""
        self._hashes.obtain(self._target, [*artifacts.values()], self._progress)
        work = Path(self._work.name)
        rules = self._options.rules
        return Sealer(self._hashes, self._packer, rules, self._target, work, self._progress)

    def _find_converted(
        self,
        layers: dict[Digest, LayerSource],
        artifacts: dict[Digest, LayerArtifact],
        reports: dict[Digest, LayerReport],
    ) -> None:
        """Takes the layers that the target, or a repository to reuse from, holds converted."""
        found = self._transfer.map(self._find_one, layers.values())
        for layer, artifact in zip(layers.values(), found, strict=True):
            if artifact is None:
                continue
            artifacts[layer.diff_id] = artifact
            self._known.learn_all(artifact.chunk_map)
            reports[layer.diff_id] = _report(layer, artifact, None)
            self._progress.done(layer.label, "reused")

    def _find_one(self, layer: LayerSource) -> LayerArtifact | None:
        rules = self._options.rules
        found = find_artifact(self._target, layer, rules)
        if found is not None and missing_pack(self._target, found.chunk_map) is None:
            return found
        for repository in self._reuse:
            found = find_artifact(repository, layer, rules)
            if found is None:
                continue
            self._prepare_target()
            with self._taking:  # two layers may use one pack
                for pack in found.chunk_map.packs:
                    self._copy(repository, pack_descriptor(pack))
                hashes = self._copied_hashes(repository, found.hashes)
            return publish_artifact(self._target, found.index, found.chunk_map, hashes)
        return None

    def _copied_hashes(self, source: Repository, hashes: Descriptor | None) -> Descriptor | None:
        """The hashes of a layer's blocks, now in the target; None if there are none or they are
        gone, as they can be made anew."""
        try:
            if hashes is not None:
                self._copy(source, hashes)
        except NotFound:
            return None
        return hashes

    def _copy(self, source: Repository, descriptor: Descriptor) -> None:
        copy_blob(source, self._target, descriptor, Path(self._work.name))

    def _prepare_target(self) -> None:
        """Stores what all artefacts share before they are published side by side."""
        with self._taking:
            if not self._prepared:
                put_empty(self._target)
                self._prepared = True

    def _obtain_pack(self, pack: PackRef) -> bool:
        """Whether the target has the pack, or can take it over without an upload."""
        descriptor = pack_descriptor(pack)
        return self._target.has_blob(descriptor) or any(
            repository.has_blob(descriptor) and self._target.mount_blob(descriptor, repository)
            for repository in self._reuse
        )

    def _convert_layers(
        self,
        source: Repository,
        missing: Sequence[LayerSource],
        artifacts: dict[Digest, LayerArtifact],
        reports: dict[Digest, LayerReport],
    ) -> None:
        # The largest layer takes longest to fetch and decompress, which one core does: it goes
        # first, and the others are packed meanwhile. Packing keeps the order of the layers.
        spooled: dict[Digest, Future[tuple[BuiltLayer, Path]]] = {
            layer.diff_id: self._ingest.submit(self._spool, source, layer)
            for layer in sorted(missing, key=lambda layer: -layer.descriptor.size)
        }
        self._running += spooled.values()
        published: list[_Publishing] = []
        try:
            for layer in missing:
                built, tar = spooled.pop(layer.diff_id).result()
                packed = self._pack(layer, built, tar)
                earlier = [item.artifact for item in published]
                future = self._transfer.submit(self._publish, layer, built, packed, earlier)
                self._running.append(future)
                published.append(_Publishing(layer, packed, future))
        except Exception:
            # A rerun finds the layers that were finished before the one that failed.
            for item in published:
                with contextlib.suppress(Exception):
                    self._remember(item.artifact.result())
            raise
        for item in published:
            artifact = artifacts[item.layer.diff_id] = item.artifact.result()
            self._remember(artifact)
            reports[item.layer.diff_id] = _report(item.layer, artifact, item.packed)

    def _remember(self, artifact: LayerArtifact) -> None:
        tag = layer_tag(artifact.index.diff_id, artifact.index.rules)
        self._index.add(artifact.chunk_map, artifact_name(self._target, tag))

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Cancelled

    def _spool(self, source: Repository, layer: LayerSource) -> tuple[BuiltLayer, Path]:
        """Fetches and indexes one layer; runs on the ingest pool."""
        options, progress = self._options, self._progress
        tar = Path(self._work.name) / f"{layer.label}.tar"

        def advance(count: int) -> None:
            self._check_stop()
            progress.advance(layer.label, count)

        progress.stage(layer.label, "fetch", layer.descriptor.size)
        try:
            ingest.spool(source, layer, tar, options.limits, advance)
            built = ingest.index_tar(
                tar, layer, options.rules, options.limits, strip_root=options.strip_root
            )
        except OSError as error:
            raise ResourceExhausted(
                f"cannot spool layer {layer.descriptor.digest}: {error.strerror}",
                hint=f"{options.work_dir} needs room for the image's layers, decompressed; "
                "choose another disk with --work-dir",
            ) from error
        return built, tar

    def _pack(self, layer: LayerSource, built: BuiltLayer, tar: Path) -> PackedLayer:
        self._progress.stage(layer.label, "pack", built.index.extent_blocks << 12)
        with contextlib.ExitStack() as stack:
            hashed: Callable[[bytes], None] = _ignore
            if self._options.verity:
                hashed = stack.enter_context(self._hashes.taking(layer.diff_id))

            def advance(data: bytes) -> None:
                hashed(data)
                self._progress.advance(layer.label, len(data))

            packed = self._packer.pack(built, tar, advance)
        tar.unlink()
        return packed

    def _publish(
        self,
        layer: LayerSource,
        built: BuiltLayer,
        packed: PackedLayer,
        earlier: Sequence[Future[LayerArtifact]],
    ) -> LayerArtifact:
        """Stores packs and artefact; runs on the transfer pool.

        Packs of several layers are stored at once, but an artefact may name packs of layers below
        it, so it waits for theirs: those tasks were submitted before, so they are under way.
        """
        self._progress.stage(layer.label, "upload", packed.new_bytes)
        for pack in packed.new_packs:
            self._check_stop()
            self._target.put_blob(pack_descriptor(pack.ref), pack.path)
            pack.path.unlink(missing_ok=True)
            self._progress.advance(layer.label, pack.ref.size)
        self._prepare_target()
        for artifact_below in earlier:
            artifact_below.result()
        hashes = self._hashes.store(self._target, layer.diff_id) if self._options.verity else None
        artifact = publish_artifact(self._target, built.index, packed.chunk_map, hashes)
        self._progress.done(layer.label, f"{packed.new_bytes >> 10} KiB new")
        return artifact


def _ignore(data: bytes) -> None:
    """Nobody wants the hashes."""


def _report(layer: LayerSource, artifact: LayerArtifact, packed: PackedLayer | None) -> LayerReport:
    return LayerReport(
        diff_id=layer.diff_id,
        reused=packed is None,
        compressed=layer.descriptor.size,
        extent=artifact.index.extent_blocks << 12,
        chunks=len(artifact.chunk_map.extents[0]),
        new_chunks=packed.new_chunks if packed else 0,
        stored=packed.new_bytes if packed else 0,
    )
