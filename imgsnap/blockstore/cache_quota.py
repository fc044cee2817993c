"""The node cache's quota: the most bytes it may take, kept with the cache.

The record is one line of text, the bytes in decimal. A damaged one is reported and counts as none:
the cache then grows as it would without a quota, and nothing is lost.
"""

import logging
import os
from pathlib import Path

from imgsnap.blockstore.node_cache import NodeCache, cache_error
from imgsnap.blockstore.write_budget import WRITE_BUDGET
from imgsnap.errors import InvalidArgument
from imgsnap.units import parse_size

UNLIMITED = 1 << 62
"""Bytes; a quota that no disk reaches, in place of a kept one."""
_RECORD_MAX = 32
_log = logging.getLogger(__name__)


def parse_quota(text: str) -> int:
    """Bytes of text such as ``20GiB`` or ``none``. Raises InvalidArgument."""
    if text.strip().lower() == "none":
        return UNLIMITED
    try:
        return min(parse_size(text), UNLIMITED)
    except ValueError as error:
        raise InvalidArgument(
            f"cache quota {text!r} is no size", hint="for example 20GiB, or none"
        ) from error


def kept_quota(cache: NodeCache) -> int:
    """The quota kept with the cache, UNLIMITED when there is none."""
    path = _path(cache)
    try:
        raw = path.read_bytes()[:_RECORD_MAX]
    except OSError:
        return UNLIMITED
    if raw.endswith(b"\n") and raw[:-1].isdigit():
        return min(int(raw), UNLIMITED)
    _log.warning("%s is damaged and ignored; set the quota again", path)
    return UNLIMITED


def quota(cache: NodeCache) -> int:
    """The quota in force: this process's own before the kept one."""
    return kept_quota(cache) if cache.quota is None else cache.quota


def keep_quota(cache: NodeCache, size: int) -> None:
    """Keeps a quota with the cache, durably. Raises ImgsnapError when it cannot be written."""
    path = _path(cache)
    try:
        if size >= UNLIMITED:
            path.unlink(missing_ok=True)
        else:
            with cache.new_file(path) as file:
                file.write(b"%d\n" % size)
                file.flush()
                os.fsync(file.fileno())
        _sync_directory(cache.root)
    except OSError as error:
        raise cache_error(error, f"cannot write {path}") from error


def _path(cache: NodeCache) -> Path:
    return cache.root / "quota"


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def enforce(cache: NodeCache) -> int | None:
    """Evicts until the cache is below its quota with room to write; the bytes of room it has.

    Negative when what is left is in use or pinned. None without a quota: then nothing is walked.
    """
    limit = quota(cache)
    if limit >= UNLIMITED:
        return None
    from imgsnap.blockstore.cache_evict import evict
    from imgsnap.blockstore.cache_usage import scan

    entries = scan(cache)
    used = sum(entry.bytes for entry in entries)
    if used > limit - room_wanted(limit):
        used = evict(cache, limit - room_wanted(limit), entries).used
    return limit - used


def room_wanted(limit: int) -> int:
    """Evicting goes this far below the quota, so that not every write has to evict."""
    return min(WRITE_BUDGET, limit // 8)
