"""Counters of the block store.

Plain integers without a lock: a count may be lost when two threads add at the same instant, and
that is cheaper than a lock on every read.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class FetchCounts:
    """What one kind of fetch asked the repository for."""

    requests: int = 0
    bytes: int = 0  # as sent by the repository: frames and the gaps between them
    chunks: int = 0


@dataclass(slots=True)
class PackCounts:
    """What a boot pack brought."""

    requests: int = 0
    bytes: int = 0  # as sent by the repository
    blocks: int = 0  # that arrived and were verified
    used: int = 0  # of them, read at least once
    served: int = 0  # blocks in answers to reads
    waits: int = 0  # reads that waited for the pack
    given_up: int = 0  # times that waiting readers were let go because nothing arrived
    failures: int = 0  # packs that were given up

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(slots=True)
class CacheCounts:
    """What a process saw of the extent cache, which all its snapshots share."""

    damage: int = 0  # cached chunks that failed verification

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(slots=True)
class Statistics:
    """One snapshot's, since it was opened."""

    demand: FetchCounts = field(default_factory=FetchCounts)
    readahead: FetchCounts = field(default_factory=FetchCounts)
    prefetch: FetchCounts = field(default_factory=FetchCounts)
    pack: PackCounts = field(default_factory=PackCounts)
    hits: int = 0  # reads answered from verified local bytes
    misses: int = 0  # reads that waited for at least one chunk
    source_damage: int = 0  # frames from the repository that failed verification
    unstored: int = 0  # chunks that could not be kept on disk
    failures: int = 0  # fetches that ended in an error
    hedges: int = 0  # ranges asked for a second time because their first byte was late
    hosts: dict[str, FetchCounts] = field(default_factory=dict)  # who served; chunks are not split

    def host(self, name: str) -> FetchCounts:
        """What one host served."""
        return self.hosts.setdefault(name, FetchCounts())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
