"""A snapshot's device for one caller who reads it in this process."""

from collections.abc import Iterator
from contextlib import contextmanager

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.blockstore.store import BlockStore


@contextmanager
def attach_reader(snapshot: Snapshot, cache: NodeCache) -> Iterator[BlockReader]:
    """A block reader over the snapshot; the snapshot itself stays open.

    Without readahead: who reads this way knows what it wants, and asks for it in large pieces.
    """
    store = BlockStore(cache)
    reader = store.reader(snapshot, ReadOptions(readahead_max=0, prefetch="off"))
    try:
        yield reader
    finally:
        store.close()
        reader.close()
