"""A whole block store over a memory repository, closed in the right order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.extent_cache import ExtentPool
from imgsnap.blockstore.fetcher import Fetcher
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot, open_snapshot
from imgsnap.blockstore.statistics import Statistics
from imgsnap.oci.repository import Repository


@dataclass(frozen=True)
class OpenStore:
    reader: BlockReader
    snapshot: Snapshot
    fetcher: Fetcher
    statistics: Statistics
    cache: NodeCache


@contextmanager
def open_store(
    repository: Repository,
    cache_dir: Path,
    reference: str = "latest",
    *,
    threads: int = 8,
    readahead_max: int = 0,
    deadline_s: float = 20.0,
) -> Iterator[OpenStore]:
    """Everything a server has; without readahead unless asked for, to keep request logs exact."""
    cache = NodeCache(cache_dir)
    statistics = Statistics()
    snapshot = open_snapshot(repository, reference, cache)
    fetcher = Fetcher(cache, statistics, threads)
    reader = BlockReader(
        snapshot,
        ExtentPool(cache, statistics),
        fetcher,
        statistics,
        readahead_max=readahead_max,
        deadline_s=deadline_s,
    )
    try:
        yield OpenStore(reader, snapshot, fetcher, statistics, cache)
    finally:
        fetcher.close()
        reader.close()
        snapshot.close()
