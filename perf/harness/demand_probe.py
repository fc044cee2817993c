"""Latencies of single reads of chunks that are not here, alone and while everything is prefetched.

`python -m harness.demand_probe REFERENCE CACHE COUNT idle|busy` prints JSON: seconds of each read
that had to fetch, sorted, and what came meanwhile.
"""

import json
import random
import sys
import threading
import time
from pathlib import Path

from harness.product import open_places
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.blockstore.store import BlockStore
from imgsnap.oci.reference import parse_location

FULL = 4 << 20
"""Bytes after which the link is full."""


def main() -> None:
    reference, cache, count, kind = sys.argv[1:]
    places, _ = open_places(cache, cache, cache)
    repository, tag = places._open(parse_location(reference), create=False)
    with BlockStore(NodeCache(Path(cache))) as store:
        device = store.open(repository, tag, options=ReadOptions(readahead_max=0, prefetch="off"))
        reader = device.reader
        ended = threading.Event()
        if kind == "busy":
            threading.Thread(target=_warm, args=(reader, ended), daemon=True).start()
            while not ended.is_set() and reader.statistics.prefetch.bytes < FULL:
                time.sleep(0.01)
        rng = random.Random(7)
        found = []
        while len(found) < int(count) and not ended.is_set():
            offset = rng.randrange(reader.size // 4096) * 4096
            before = reader.statistics.misses
            started = time.perf_counter()
            reader.read(offset, 4096)
            if reader.statistics.misses > before:
                found.append(time.perf_counter() - started)
        value = {"latencies_s": sorted(found), "statistics": reader.statistics.as_dict()}
        print(json.dumps(value))
        sys.stdout.flush()
        store.close()


def _warm(reader: object, ended: threading.Event) -> None:
    try:
        reader.warm()  # type: ignore[attr-defined]
    except Exception:  # the store is closed under it
        ended.set()
    ended.set()


if __name__ == "__main__":
    main()
