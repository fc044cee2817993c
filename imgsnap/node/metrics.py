"""The node's metrics in Prometheus' text format 0.0.4.

Values come from the block server's `status` and from what the control process knows; what nobody
could tell is left out, and `imgsnap_up` says why. Counters begin at 0 with each block server and
each attachment.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from imgsnap.blockstore.cache_quota import UNLIMITED
from imgsnap.blockstore.stalls import BUCKETS_S
from imgsnap.node.prometheus import (
    PROCESS_FAMILIES,
    Sample,
    families,
    histogram,
    page,
    process_samples,
)

SNAPSHOTS_MAX = 512
"""Snapshots with series of their own, the first that were opened; `imgsnap_snapshots_left_out`
counts the others."""
HOSTS_MAX = 16
"""Per snapshot."""

_OWN = ("snapshot", "repository")


FAMILIES = families(
    (
        ("up", "gauge", (), "Whether the block server answers: 1 or 0."),
        ("build_info", "gauge", ("version",), "Always 1."),
        ("attachments", "gauge", (), "Snapshots that the daemon has attached."),
        ("mounts", "gauge", ("server",), "Directories that show a snapshot."),
        ("snapshots_open", "gauge", (), "Snapshots that the block server has opened."),
        ("snapshots_left_out", "gauge", (), "Open snapshots without series of their own."),
        ("block_server_starts_total", "counter", (), "Block servers that were started."),
        ("reads_total", "counter", (*_OWN, "result"), "Reads by the kernel."),
        ("fetch_requests_total", "counter", (*_OWN, "priority"), "Range requests."),
        ("fetch_bytes_total", "counter", (*_OWN, "priority"), "Bytes that hosts have sent."),
        ("fetch_chunks_total", "counter", (*_OWN, "priority"), "Chunks that were verified."),
        ("host_requests_total", "counter", (*_OWN, "host"), "Requests that a host answered."),
        ("host_bytes_total", "counter", (*_OWN, "host"), "Bytes that a host has sent."),
        ("pack_requests_total", "counter", _OWN, "Requests for boot packs."),
        ("pack_bytes_total", "counter", _OWN, "Bytes of boot packs."),
        ("pack_blocks_total", "counter", _OWN, "Blocks that boot packs brought."),
        ("pack_used_blocks_total", "counter", _OWN, "Of them, blocks that were read."),
        ("hedges_total", "counter", _OWN, "Ranges that were asked for a second time."),
        ("stall_seconds", "histogram", _OWN, "Waits of reads that were not answered at once."),
        ("failed_fetches_total", "counter", _OWN, "Chunks whose fetch ended in an error."),
        ("unstored_chunks_total", "counter", _OWN, "Chunks that the disk could not keep."),
        ("damaged_chunks_total", "counter", (*_OWN, "place"), "Chunks that failed verification."),
        ("cache_bytes", "gauge", ("kind",), "Allocated bytes of the node cache."),
        ("cache_quota_bytes", "gauge", (), "The most it may take; +Inf without a quota."),
        *PROCESS_FAMILIES,
    )
)


@dataclass(frozen=True, slots=True)
class NodeState:
    """What the control process knows at one moment; None is what it could not find out."""

    version: str
    server: Mapping[str, Any] | None  # the block server's status
    supervisor: Mapping[str, Any] | None  # the supervisor's
    attachments: int | None = None
    mounts: Mapping[str, int] = field(default_factory=dict)  # by who serves them
    cache: Mapping[str, int] | None = None  # allocated bytes by kind
    quota: int | None = None
    processes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def render(state: NodeState) -> str:
    """The whole page."""
    return page(FAMILIES, _samples(state))


def _samples(state: NodeState) -> Iterator[Sample]:
    yield Sample("up", {}, int(state.server is not None))
    yield Sample("build_info", {"version": state.version}, 1)
    if state.attachments is not None:
        yield Sample("attachments", {}, state.attachments)
    for server, count in state.mounts.items():
        yield Sample("mounts", {"server": server}, count)
    if state.supervisor is not None and "starts" in state.supervisor:
        yield Sample("block_server_starts_total", {}, state.supervisor["starts"])
    if state.server is not None:
        yield from _server(state.server)
    for kind, size in (state.cache or {}).items():
        yield Sample("cache_bytes", {"kind": kind}, size)
    if state.quota is not None:
        limit = float("inf") if state.quota >= UNLIMITED else state.quota
        yield Sample("cache_quota_bytes", {}, limit)
    yield from process_samples(state.processes)


def _server(status: Mapping[str, Any]) -> Iterator[Sample]:
    devices = status["devices"]
    yield Sample("snapshots_open", {}, len(devices))
    yield Sample("snapshots_left_out", {}, max(0, len(devices) - SNAPSHOTS_MAX))
    cache = {"snapshot": "", "repository": "", "place": "cache"}
    yield Sample("damaged_chunks_total", cache, status["cache"]["damage"])
    for name, counts in islice(devices.items(), SNAPSHOTS_MAX):
        stalls = status["stalls"].get(name, {})
        labels = {"snapshot": f"sha256:{name}", "repository": stalls.get("repository", "")}
        yield from _snapshot(labels, counts)
        yield from _histogram(labels, stalls)


def _snapshot(own: Mapping[str, str], counts: Mapping[str, Any]) -> Iterator[Sample]:
    for result in ("hit", "miss"):
        key = {"hit": "hits", "miss": "misses"}[result]
        yield Sample("reads_total", {**own, "result": result}, counts.get(key, 0))
    for priority in ("demand", "readahead", "prefetch"):
        for key, value in counts.get(priority, {}).items():
            yield Sample(f"fetch_{key}_total", {**own, "priority": priority}, value)
    for host, fetched in islice(sorted(counts.get("hosts", {}).items()), HOSTS_MAX):
        yield Sample("host_requests_total", {**own, "host": host}, fetched["requests"])
        yield Sample("host_bytes_total", {**own, "host": host}, fetched["bytes"])
    pack = counts.get("pack", {})
    for family, key in (
        ("pack_requests_total", "requests"),
        ("pack_bytes_total", "bytes"),
        ("pack_blocks_total", "blocks"),
        ("pack_used_blocks_total", "used"),
    ):
        yield Sample(family, own, pack.get(key, 0))
    for family, key in (
        ("hedges_total", "hedges"),
        ("failed_fetches_total", "failures"),
        ("unstored_chunks_total", "unstored"),
    ):
        yield Sample(family, own, counts.get(key, 0))
    source = {**own, "place": "source"}
    yield Sample("damaged_chunks_total", source, counts.get("source_damage", 0))


def _histogram(own: Mapping[str, str], stalls: Mapping[str, Any]) -> Iterator[Sample]:
    buckets = stalls.get("buckets", ())
    if buckets:
        yield from histogram("stall_seconds", own, BUCKETS_S, buckets, stalls["seconds"])
