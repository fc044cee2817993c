"""Leases: a shared flock(2) on a cache file keeps it from eviction while a process has it open.

The kernel gives the lock back when the process ends, however it ends. Evicting takes the
exclusive lock and never waits for it. A file that was evicted between its opening and its lease
has lost its name by then, so who leases looks at the name once more: `names`.
"""

import fcntl
import os
from pathlib import Path


def hold(fd: int) -> bool:
    """Leases an open file until it is closed; False while somebody is evicting it.

    On a file system without locks everything counts as leased: `claim` never succeeds there.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def claim(fd: int) -> bool:
    """Whether nobody else has leased the open file; it is ours alone until it is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def names(path: Path, fd: int) -> bool:
    """Whether `path` still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except OSError:
        return False
