"""Kills a process at each of its steps that change a file system: ``python -m … SCENARIO ROOT``.

For n = 0, 1, … the scenario runs in a forked child in a copy ROOT/n of ROOT/start, and the child
kills itself before its n-th step; a write of data is first done by half. The last n is the one that
the child survived. Prints how many steps there were.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from imgsnap.blockstore.cache_check import check_cache
from imgsnap.blockstore.cache_evict import evict
from imgsnap.blockstore.cache_pins import pin_snapshot
from imgsnap.blockstore.cache_usage import scan
from imgsnap.blockstore.node_cache import NodeCache
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import BuiltSnapshot, build_snapshot, random_device

BLOCKS = 60
STEPS = ("pwrite", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate", "fsync", "utime")


def built() -> BuiltSnapshot:
    return build_snapshot(random_device(BLOCKS, seed=77), extents=2, metadata_blocks=2, packs=1)


def fill(root: Path) -> None:
    with open_store(MemoryRepository(built()), root, threads=1) as store:
        pin_snapshot(store.cache, store.snapshot, "crash")
        store.reader.warm()


def evicting(root: Path) -> None:
    cache = NodeCache(root)
    evict(cache, 0, scan(cache))


def repair(root: Path) -> None:
    check_cache(NodeCache(root), repair=True)


SCENARIOS: dict[str, Callable[[Path], None]] = {
    "fill": fill,
    "evict": evicting,
    "repair": repair,
    "refill": fill,
}


def _arm(number: int) -> None:
    """Makes this process kill itself before its step `number`."""
    left = number

    def step(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if not left:
                if name == "pwrite":
                    fd, data, offset = arguments
                    function(fd, bytes(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)

        return wrapped

    for name in STEPS:
        setattr(os, name, step(name, getattr(os, name)))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "open" and "w" in str(arguments[1] or ""):
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(audit)


def main(scenario: str, root: Path) -> int:
    for number in count():
        place = root / str(number)
        shutil.copytree(root / "start", place)
        child = os.fork()
        if not child:
            _arm(number)
            try:
                SCENARIOS[scenario](place)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            return number if os.waitstatus_to_exitcode(status) == 0 else -1
    raise AssertionError


if __name__ == "__main__":
    print(main(sys.argv[1], Path(sys.argv[2])))
