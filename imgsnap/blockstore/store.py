"""The block store of one process: what all the snapshots that it reads share."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

from imgsnap.blockstore.extent_cache import ExtentPool
from imgsnap.blockstore.fetcher import DEFAULT_THREADS, Fetcher
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import Prefetch, ReadOptions
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.resolve import Admit, admit_all, is_known
from imgsnap.blockstore.snapshot import Snapshot, open_snapshot
from imgsnap.oci.repository import Platform, Repository

if TYPE_CHECKING:
    from imgsnap.blockstore.boot_stream import BootLoader


REQUESTS_AT_ONCE = 5
"""Config, metadata, chunk map, and the list of boot packs in two ways."""


class Device:
    """An opened snapshot and the reader of its bytes; close it when nobody reads any more."""

    def __init__(
        self, snapshot: Snapshot, reader: BlockReader, boot: "BootLoader | None" = None
    ) -> None:
        self.snapshot = snapshot
        self.reader = reader
        self.boot = boot

    def close(self) -> None:
        if self.boot is not None:
            self.boot.close()
        self.reader.close()
        self.snapshot.close()


class BlockStore:
    """A context manager. Safe for threads; close its devices first."""

    def __init__(self, cache: NodeCache, *, fetch_threads: int = DEFAULT_THREADS) -> None:
        self.cache = cache
        self.pool = ExtentPool(cache)
        self.fetcher = Fetcher(cache, fetch_threads)

    def open(
        self,
        repository: Repository,
        reference: str,
        *,
        platform: Platform | None = None,
        options: ReadOptions | None = None,
        admit: Admit = admit_all,
    ) -> Device:
        """Opens the snapshot that a tag or digest names, if `admit` lets it. Raises what
        `open_snapshot` raises.

        Its boot pack is looked for while the snapshot's parts are fetched, and not at all when
        everything is local. Not before, though a digest would say enough: the pack would be ahead
        of the parts on the link, and the mount waits for these (12 to 40 ms more at 100 Mbit/s).
        """
        options = options or ReadOptions()
        boot = _boot_loader(repository, self.cache, options)
        snapshot: Snapshot | None = None
        try:
            if not is_known(repository.name, reference, self.cache, platform):
                repository.expect(REQUESTS_AT_ONCE)
            snapshot = open_snapshot(
                repository,
                reference,
                self.cache,
                platform=platform,
                image_config=options.image_config,
                admit=admit,
                meanwhile=boot.start if boot is not None else lambda digest: None,
            )
            reader = self.reader(snapshot, options, boot)
            if boot is not None:
                boot.attach(snapshot.chunk_map, reader.has_local)
                if not reader.local:
                    boot.start(snapshot.manifest.digest, ask=False)
                elif not boot.started:
                    boot.buffer.end()
            return Device(snapshot, reader, boot)
        except BaseException:
            if boot is not None:
                boot.close()
            if snapshot is not None:
                snapshot.close()
            raise

    def reader(
        self, snapshot: Snapshot, options: ReadOptions, boot: "BootLoader | None" = None
    ) -> BlockReader:
        """Reads of a snapshot that the caller has opened, and closes after the reader."""
        from imgsnap.blockstore.touches import TouchLog

        return BlockReader(
            snapshot,
            self.pool,
            self.fetcher,
            readahead_max=options.readahead_max,
            deadline_s=options.deadline_s,
            prefetch=Prefetch(options.prefetch),
            prefetch_rate=options.prefetch_rate,
            boot=boot.buffer if boot is not None else None,
            touches=TouchLog() if options.trace else None,
        )

    def close(self) -> None:
        """Fails what is being fetched. No completion comes later, so devices can be closed now."""
        self.fetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _boot_loader(
    repository: Repository, cache: NodeCache, options: ReadOptions
) -> "BootLoader | None":
    if not options.boot_pack:
        return None
    from imgsnap.blockstore.boot_stream import BootLoader

    return BootLoader(repository, cache, options.boot_pack)
