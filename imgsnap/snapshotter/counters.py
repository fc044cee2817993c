"""What the snapshotter counts while it works, since it was started."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from imgsnap.node.prometheus import Sample, histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Ends of the buckets of RPCs' times."""
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Counters:
    """Safe for threads. Who counts sees to it that labels have few values."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[_Key] = Counter()
        self._buckets: dict[tuple[str, str], list[int]] = {}
        self._seconds: dict[tuple[str, str], float] = {}

    def add(self, family: str, **labels: str) -> None:
        """One more of a counter of `metrics.FAMILIES`, without its prefix and `_total`."""
        with self._lock:
            self._counts[family, tuple(labels.items())] += 1

    def rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of containerd's has ended with this status."""
        key = method, code
        with self._lock:
            buckets = self._buckets.setdefault(key, [0] * (len(SECONDS) + 1))
            buckets[bisect_left(SECONDS, seconds)] += 1
            self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def samples(self) -> Iterator[Sample]:
        with self._lock:
            counts = dict(self._counts)
            rpcs = {key: (list(found), self._seconds[key]) for key, found in self._buckets.items()}
        for (method, code), (buckets, seconds) in sorted(rpcs.items()):
            own = {"method": method, "code": code}
            yield from histogram("snapshotter_rpc_seconds", own, SECONDS, buckets, seconds)
        for (family, labels), count in sorted(counts.items()):
            yield Sample(f"snapshotter_{family}_total", dict(labels), count)
