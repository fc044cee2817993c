"""Eviction: making room in the node cache without taking anything from under a reader.

First whole extents and what was made of them for mounts without a server, the least recently used
first; then packs, boot packs, metadata, chunk maps, blobs and tags, kind by kind. What a process
has leased (lease.py) or a pin names (cache_pins.py) stays. Chunks of an open extent are never
evicted.
"""

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from imgsnap.blockstore import lease
from imgsnap.blockstore.cache_pins import Part, maintenance, pins
from imgsnap.blockstore.cache_usage import Entry
from imgsnap.blockstore.node_cache import NodeCache, remove_tree
from imgsnap.units import format_size

_ORDER = {
    "quarantine": 0,
    "extents": 1,
    "direct": 1,
    "packs": 2,
    "boot-packs": 2,
    "metadata": 3,
    "chunk-maps": 4,
    "blobs": 5,
    "tags": 6,
}
EVICTED = "evicted."
"""Begins the names under tmp/ of what is being deleted."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evicted:
    """What `evict` did, or would do."""

    removed: tuple[Entry, ...]
    used: int  # bytes of the cache afterwards
    kept: int  # bytes that are in use or pinned, as far as they were asked for


def evict(
    cache: NodeCache, keep: int, entries: Iterable[Entry], *, dry_run: bool = False
) -> Evicted:
    """Removes entries until the cache takes at most `keep` bytes, if that is possible.

    Does nothing while another process evicts. Raises ImgsnapError for a cache it cannot lock.
    """
    entries = list(entries)
    used = sum(entry.bytes for entry in entries)
    removed: list[Entry] = []
    kept = 0
    with maintenance(cache) as ours:
        if not ours:
            return Evicted((), used, 0)
        if not dry_run:
            used -= _remove_leftovers(cache, entries)
        pinned = pins(cache).parts
        for entry in sorted(
            (entry for entry in entries if entry.kind in _ORDER),
            key=lambda entry: (_ORDER[entry.kind], entry.used),
        ):
            if used <= keep:
                break
            if _spare(cache, entry, pinned, dry_run=dry_run):
                used -= entry.bytes
                removed.append(entry)
            else:
                kept += entry.bytes
    if removed and not dry_run:
        freed = format_size(sum(entry.bytes for entry in removed))
        _log.info("evicted %d entries of the node cache, %s", len(removed), freed)
    return Evicted(tuple(removed), used, kept)


def _spare(cache: NodeCache, entry: Entry, pinned: frozenset[Part], *, dry_run: bool) -> bool:
    """Removes an entry, unless it is needed or gone; whether it was or could be removed."""
    if entry.part in pinned:
        return False
    locked = entry.path / "data" if entry.kind == "extents" else entry.path
    try:
        fd = os.open(locked, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        fd = -1  # no file of ours: nobody can have leased it
    try:
        if fd >= 0 and not (lease.claim(fd) and lease.names(locked, fd)):
            return False
        if not dry_run:
            moved = cache.temporary_path()
            moved = moved.with_name(EVICTED + moved.name)
            entry.path.rename(moved)  # the name goes at once, so that nobody finds half of it
            remove_tree(moved)
    except FileNotFoundError:
        return True
    except OSError as error:
        _log.warning("cannot evict %s: %s", entry.path, error)
        return False
    finally:
        if fd >= 0:
            os.close(fd)
    return True


def _remove_leftovers(cache: NodeCache, entries: Iterable[Entry]) -> int:
    """Deletes what an eviction that was killed had renamed already; bytes of it."""
    freed = 0
    for entry in entries:
        if entry.kind == "tmp" and entry.name.startswith(EVICTED):
            with suppress(OSError):
                remove_tree(entry.path)
                freed += entry.bytes
    return freed
