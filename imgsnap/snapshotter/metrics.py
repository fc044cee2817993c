"""The snapshotter's metrics and health; docs/metrics.md explains each."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator

from imgsnap import __version__
from imgsnap.errors import ImgsnapError
from imgsnap.node.process_usage import process_usage
from imgsnap.node.prometheus import PROCESS_FAMILIES, Sample, families, page, process_samples
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.rows import STATES
from imgsnap.snapshotter.seams import Devices
from imgsnap.snapshotter.snapshots import Snapshots

FAMILIES = families(
    (
        ("snapshotter_up", "gauge", (), "Whether the ledger can be read: 1 or 0."),
        ("build_info", "gauge", ("version",), "Always 1."),
        ("snapshotter_rpc_seconds", "histogram", ("method", "code"), "Calls of containerd's."),
        ("snapshotter_snapshots", "gauge", ("state",), "Containerd snapshots."),
        ("snapshotter_devices", "gauge", (), "Snapshots that are shown on this node."),
        ("snapshotter_claims_total", "counter", ("kind",), "Layers that were not fetched."),
        ("snapshotter_fallbacks_total", "counter", ("reason",), "Layers that were not claimed."),
        ("snapshotter_materialised_layers_total", "counter", ("result",), "Claimed and fetched."),
        ("snapshotter_conversions_total", "counter", ("result",), "Images converted on first use."),
        ("snapshotter_conversions_waiting", "gauge", (), "Images that wait to be converted."),
        *PROCESS_FAMILIES,
    )
)
_log = logging.getLogger(__name__)


class SnapshotterObserver:
    """Finds out for each scrape what is not counted. Safe for threads; see `Observed`."""

    def __init__(
        self,
        snapshots: Snapshots,
        counters: Counters,
        devices: Devices | None = None,
        waiting: Callable[[], int] = lambda: 0,
    ) -> None:
        """`waiting` tells how many images wait to be converted."""
        self._snapshots = snapshots
        self._counters = counters
        self._devices = devices
        self._waiting = waiting

    def page(self) -> str:
        """See `Observed.page`."""
        return page(FAMILIES, self._samples())

    def problem(self) -> str | None:
        """See `Observed.problem`."""
        return None if self._states() is not None else "the ledger cannot be read"

    def _states(self) -> Counter[str] | None:
        try:
            return Counter(row.state for row in self._snapshots.list(()))
        except ImgsnapError as error:
            _log.warning("metrics: %s", error)
            return None

    def _samples(self) -> Iterator[Sample]:
        states = self._states()
        yield Sample("snapshotter_up", {}, int(states is not None))
        yield Sample("build_info", {"version": __version__}, 1)
        if states is not None:
            for state in STATES:
                yield Sample("snapshotter_snapshots", {"state": state}, states[state])
        if self._devices is not None:
            yield Sample("snapshotter_devices", {}, sum(1 for _ in self._devices.shown()))
        yield Sample("snapshotter_conversions_waiting", {}, self._waiting())
        yield from self._counters.samples()
        yield from process_samples({"snapshotter": process_usage(os.getpid())})
