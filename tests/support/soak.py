"""Mounts, reads and evictions for a while, through a registry that fails now and then."""

import contextlib
import gc
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.fuse.files import DEVICE_FILE
from imgsnap.fuse.server import FuseServer
from imgsnap.fuse.session import negotiate
from imgsnap.mount import attach
from imgsnap.units import KIB
from tests.support.catalog import StaticCatalog
from tests.support.faulty_store import faulty_store, open_files, publish, settled
from tests.support.registry import FAULTS, ScriptedRegistry
from tests.support.snapshots import build_snapshot, random_device

SNAPSHOTS = 4
BLOCKS = 500
FAULT_SHARE = 0.3
WARM_ROUNDS = 5


@dataclass
class Outcome:
    """What a soak saw; `rss` in bytes and `files` after each round."""

    rounds: int = 0
    reads: int = 0
    errors: int = 0
    evictions: int = 0
    rss: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    @property
    def grown(self) -> int:
        """Bytes of RSS since the caches of the process were warm."""
        return self.rss[-1] - self.rss[min(WARM_ROUNDS, len(self.rss) - 1)]


def soak(seconds: float, directory: Path, seed: int) -> Outcome:
    """Raises AssertionError for wrong bytes and for anything but EIO."""
    rng = random.Random(seed)
    outcome = Outcome()
    built = [build_snapshot(random_device(BLOCKS, seed=n), extents=2) for n in range(SNAPSHOTS)]
    end = time.monotonic() + seconds
    with ScriptedRegistry() as registry:
        registry.switches.auth = "token"
        for number, snapshot in enumerate(built):
            publish(registry, snapshot, f"v{number}")
        threads, files = threading.active_count(), open_files()
        while time.monotonic() < end or outcome.rounds < WARM_ROUNDS + 2:
            if rng.random() < 0.3:
                shutil.rmtree(directory / "cache" / "v1" / "extents", ignore_errors=True)
                outcome.evictions += 1
            registry.log.clear()
            registry.faults.clear()
            registry.switches.redirect_blobs = rng.random() < 0.5
            _round(rng, registry, built, directory, outcome)
            # The registry's own threads end when they see their connections closed.
            assert settled(threading.active_count, threads) <= threads
            gc.collect()
            outcome.rounds += 1
            outcome.files.append(settled(open_files, files))
            outcome.rss.append(_rss())
    return outcome


def _round(rng, registry, built, directory: Path, outcome: Outcome) -> None:
    chosen = rng.sample(range(SNAPSHOTS), rng.randrange(1, SNAPSHOTS))
    with faulty_store(registry, directory / "cache") as store, contextlib.ExitStack() as stack:
        files = {}
        for number in chosen:
            device = store.open(f"v{number}", readahead_max=rng.choice((0, 256 * KIB)))
            files[number] = stack.enter_context(_served(device.reader, directory / f"{number}"))
        registry.faults.extend(
            rng.choice(FAULTS) if rng.random() < FAULT_SHARE else "" for _ in range(60)
        )
        problems: list[object] = []

        def read(seed: int) -> None:
            own = random.Random(seed)
            for _ in range(10):
                number = own.choice(chosen)
                offset = own.randrange(BLOCKS * 4096)
                length = own.choice((1, 4096, 150_000))
                try:
                    data = os.pread(files[number], length, offset)
                except OSError:
                    outcome.errors += 1
                    continue
                outcome.reads += 1
                if data != built[number].device[offset : offset + length]:
                    problems.append((number, offset, length))

        readers = [threading.Thread(target=read, args=(rng.random(),)) for _ in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert not problems, problems


@contextlib.contextmanager
def _served(reader, directory: Path) -> Iterator[int]:
    """A descriptor of the device's file, served through FUSE."""
    directory.mkdir(exist_ok=True)
    fuse = attach.mount_fuse(directory)
    server = FuseServer(fuse, StaticCatalog({"one": reader}), negotiate(fuse))
    server.start()
    fd = -1
    try:
        fd = os.open(directory / "one" / DEVICE_FILE, os.O_RDONLY | os.O_CLOEXEC)
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)
        attach.unmount(directory, lazy=True)
        assert server.join(20)
        os.close(fuse)


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
