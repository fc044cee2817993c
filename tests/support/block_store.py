"""A whole block store over a memory repository, closed in the right order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.boot_stream import BootLoader
from imgsnap.blockstore.fetcher import Fetcher
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.blockstore.reader import BlockReader
from imgsnap.blockstore.snapshot import Snapshot
from imgsnap.blockstore.statistics import Statistics
from imgsnap.blockstore.store import BlockStore
from imgsnap.oci.repository import Repository


@dataclass(frozen=True)
class OpenStore:
    reader: BlockReader
    snapshot: Snapshot
    fetcher: Fetcher
    statistics: Statistics
    cache: NodeCache
    boot: BootLoader | None


@contextmanager
def open_store(
    repository: Repository,
    cache_dir: Path,
    reference: str = "latest",
    *,
    threads: int = 8,
    readahead_max: int = 0,
    deadline_s: float = 20.0,
    boot_pack: tuple[str, ...] = (),
    trace: bool = False,
    prefetch: str = "off",
    prefetch_rate: int = 0,
) -> Iterator[OpenStore]:
    """Everything a server has; without readahead unless asked for, to keep request logs exact."""
    store = BlockStore(NodeCache(cache_dir), fetch_threads=threads)
    options = ReadOptions(
        readahead_max,
        deadline_s,
        prefetch=prefetch,
        prefetch_rate=prefetch_rate,
        boot_pack=boot_pack,
        trace=trace,
    )
    device = store.open(repository, reference, options=options)
    reader = device.reader
    try:
        yield OpenStore(
            reader, device.snapshot, store.fetcher, reader.statistics, store.cache, device.boot
        )
    finally:
        store.close()
        device.close()
