"""A snapshot's device for one process: pool, fetcher and reader, closed in the right order."""

from collections.abc import Iterator
from contextlib import contextmanager

from imgsnap.blockstore.extent_cache import ExtentPool
from imgsnap.blockstore.fetcher import Fetcher
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.blockstore.statistics import Statistics


@contextmanager
def attach_reader(snapshot: Snapshot, cache: NodeCache) -> Iterator[BlockReader]:
    """A block reader over the snapshot; the snapshot itself stays open.

    Without readahead: who reads this way knows what it wants, and asks for it in large pieces.
    """
    statistics = Statistics()
    fetcher = Fetcher(cache, statistics)
    pool = ExtentPool(cache, statistics)
    reader = BlockReader(snapshot, pool, fetcher, statistics, readahead_max=0)
    try:
        yield reader
    finally:
        fetcher.close()
        reader.close()
