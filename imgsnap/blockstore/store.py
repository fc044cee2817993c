"""The block store of one process: what all the snapshots that it reads share."""

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from imgsnap.blockstore.completion import Prefetch
from imgsnap.blockstore.extent_cache import ExtentPool
from imgsnap.blockstore.fetcher import DEFAULT_DEADLINE_S, DEFAULT_THREADS, Fetcher
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.readahead import WINDOW_MAX
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot, open_snapshot
from imgsnap.oci.repository import Platform, Repository


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How one snapshot is read."""

    readahead_max: int = WINDOW_MAX  # bytes; 0 switches readahead off
    deadline_s: float = DEFAULT_DEADLINE_S  # of one read
    prefetch: str = Prefetch.PACK  # what is fetched unasked; see Prefetch
    prefetch_rate: int = 0  # bytes of packs per second in the background; 0: no limit


class Device:
    """An opened snapshot and the reader of its bytes; close it when nobody reads any more."""

    def __init__(self, snapshot: Snapshot, reader: BlockReader) -> None:
        self.snapshot = snapshot
        self.reader = reader

    def close(self) -> None:
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
    ) -> Device:
        """Opens the snapshot that a tag or digest names. Raises what `open_snapshot` raises."""
        snapshot = open_snapshot(repository, reference, self.cache, platform=platform)
        try:
            return Device(snapshot, self.reader(snapshot, options or ReadOptions()))
        except BaseException:
            snapshot.close()
            raise

    def reader(self, snapshot: Snapshot, options: ReadOptions) -> BlockReader:
        """Reads of a snapshot that the caller has opened, and closes after the reader."""
        return BlockReader(
            snapshot,
            self.pool,
            self.fetcher,
            readahead_max=options.readahead_max,
            deadline_s=options.deadline_s,
            prefetch=Prefetch(options.prefetch),
            prefetch_rate=options.prefetch_rate,
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
