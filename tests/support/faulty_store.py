"""A block store over a scripted registry, with impatient connections; what it may leave behind."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.blockstore.store import BlockStore
from imgsnap.oci.auth import Authenticator
from imgsnap.oci.connections import ConnectionOptions
from imgsnap.oci.credentials import Credentials
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.retry import RetryPolicy
from imgsnap.oci.transport import Transport
from tests.support.registry import ScriptedRegistry
from tests.support.snapshots import BuiltSnapshot

NAME = "team/app"
SILENCE_S = 0.2
DEADLINE_S = 3.0


@dataclass(frozen=True)
class User:
    """Credentials of a registry's one user."""

    registry: ScriptedRegistry

    def lookup(self, registry: str, repository: str = "") -> Credentials:
        return Credentials(self.registry.username, self.registry.password)


def publish(registry: ScriptedRegistry, built: BuiltSnapshot, tag: str = "latest") -> None:
    for data in built.blobs.values():
        registry.add_blob(NAME, data)
    manifest = built.manifest
    registry.add_manifest(NAME, manifest.raw, manifest.descriptor.media_type, tag)


def repository(registry: ScriptedRegistry) -> RegistryRepository:
    retry = RetryPolicy(attempts_max=4, base_s=0.005, backoff_max_s=0.02)
    options = ConnectionOptions(plain_http=True, read_timeout_s=SILENCE_S)
    transport = Transport(registry.host, Authenticator(User(registry)), options, retry=retry)
    return RegistryRepository(transport, NAME, owns_transport=True)


@contextmanager
def faulty_store(registry: ScriptedRegistry, cache: Path) -> Iterator["FaultyStore"]:
    """A store whose overdue reads are failed, as a block server does."""
    with ExitStack() as stack:
        opened = repository(registry)
        stack.callback(opened.close)
        store = BlockStore(NodeCache(cache), fetch_threads=6)
        ended = threading.Event()

        def expire() -> None:
            while not ended.wait(0.1):
                store.fetcher.expire()

        ticker = threading.Thread(target=expire)
        ticker.start()
        stack.callback(lambda: (ended.set(), ticker.join()))
        yield FaultyStore(store, opened, stack)
        store.close()


class FaultyStore:
    def __init__(self, store: BlockStore, repository: RegistryRepository, stack: ExitStack) -> None:
        self.store = store
        self._repository = repository
        self._stack = stack

    def open(self, tag: str = "latest", *, readahead_max: int = 0):
        options = ReadOptions(readahead_max=readahead_max, deadline_s=DEADLINE_S)
        device = self.store.open(self._repository, tag, options=options)
        self._stack.callback(device.close)
        return device


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def settled(count, most: int, seconds: float = 10.0) -> int:
    """What `count` says once it is at most `most`, or after a while: threads take time to end."""
    end = time.monotonic() + seconds
    while count() > most and time.monotonic() < end:
        time.sleep(0.02)
    return count()
