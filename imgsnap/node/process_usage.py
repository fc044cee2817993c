"""What a process takes of the machine, from /proc (proc(5))."""

import os
from pathlib import Path

_STAT_UTIME, _STAT_STIME = 11, 12
"""Fields of /proc/<pid>/stat counted after the command's closing parenthesis; clock ticks."""


def process_usage(pid: int) -> dict[str, float]:
    """Resident bytes, CPU seconds and open descriptors; empty when there is no such process."""
    root = Path("/proc", str(pid))
    try:
        fields = (root / "stat").read_text().rpartition(")")[2].split()
        resident_pages = int((root / "statm").read_text().split()[1])
        fds = sum(1 for _ in (root / "fd").iterdir())
    except (OSError, IndexError):
        return {}
    ticks = int(fields[_STAT_UTIME]) + int(fields[_STAT_STIME])
    return {
        "rss_bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"),
        "open_fds": fds,
    }
