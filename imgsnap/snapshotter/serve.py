"""The snapshotter's process: the ledger's only writer, behind a socket."""

import fcntl
import logging
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from imgsnap.containerd.api.services.snapshots.v1.snapshots_pb2_grpc import (
    add_SnapshotsServicer_to_server,
)
from imgsnap.containerd.connection import MESSAGE_BYTES_MAX, start_at
from imgsnap.errors import Busy
from imgsnap.node import signals
from imgsnap.node.metrics_http import MetricsServer
from imgsnap.node.systemd import notify
from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.directories import Directories, make_root
from imgsnap.snapshotter.first_use import FirstUse
from imgsnap.snapshotter.image_service import ImageService, start_image_service
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.metrics import SnapshotterObserver
from imgsnap.snapshotter.mount_forms import MountForm
from imgsnap.snapshotter.seams import Devices, ImageFinder, LayerUnpacker
from imgsnap.snapshotter.service import SnapshotsService
from imgsnap.snapshotter.snapshots import Snapshots

THREADS = 16
WAITING_THREADS = 64
"""For calls that may wait for a registry."""
STOP_GRACE_S = 10.0
"""For calls under way when the process is asked to end."""
_STOP = (signal.SIGTERM, signal.SIGINT)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a snapshotter is made of; without a finder and devices all images are ordinary."""

    finder: ImageFinder | None = None
    devices: Devices | None = None
    unpacker: LayerUnpacker | None = None
    form: MountForm = MountForm.OVERLAY
    first_use: FirstUse | None = None
    counters: Counters = field(default_factory=Counters)


def serve(
    root: Path,
    address: Path,
    parts: Parts,
    *,
    image_service: ImageService | None = None,
    metrics: str | None = None,
) -> int:
    """Serves the snapshots in `root` at the socket `address` until SIGTERM or SIGINT.

    With an image service that is served too, for credentials. `metrics` is an address and port to
    serve them on. To be called in the main thread.
    Raises Busy when another process serves `root`, InvalidArgument when that cannot be, and what
    MetricsServer raises.
    """
    with signals.catch(_STOP) as next_signal, opened(root, parts) as snapshots:
        if metrics:
            MetricsServer(metrics, _observer(snapshots, parts)).start()
        servers = [start_server(snapshots, address, parts.counters)]
        _log.info("serving %s at %s", root, address)
        if image_service is not None:
            servers.append(start_image_service(image_service))
            _log.info("serving CRI's images at %s", image_service.address)
        notify(os.environ, "READY=1")
        _log.info("ending on %s", signal.Signals(next_signal()).name)
        notify(os.environ, "STOPPING=1")
        for ended in [server.stop(STOP_GRACE_S) for server in servers]:
            ended.wait()
        address.unlink(missing_ok=True)
        if image_service is not None:
            image_service.address.unlink(missing_ok=True)
    return 0


def _observer(snapshots: Snapshots, parts: Parts) -> SnapshotterObserver:
    waiting = parts.first_use.waiting if parts.first_use else lambda: 0
    return SnapshotterObserver(snapshots, parts.counters, parts.devices, waiting)


@contextmanager
def opened(root: Path, parts: Parts | None = None) -> Iterator[Snapshots]:
    """The snapshots in `root`, recovered, and closed in the end; one process at a time.

    Raises Busy, and what opening the ledger raises.
    """
    parts = parts or Parts()
    with _owned(root), closing(Ledger.open(root)) as ledger, ExitStack() as stack:
        directories, first_use = Directories(root), parts.first_use
        claims = Claims(
            ledger, directories, parts.finder, parts.devices, parts.unpacker, parts.counters
        )
        on_use = first_use.used if first_use else None
        snapshots = Snapshots(ledger, directories, claims, parts.form, on_use)
        snapshots.recover()
        stack.callback(snapshots.close)
        if first_use is not None:
            first_use.start()
            stack.callback(first_use.close)
        yield snapshots


def start_server(
    snapshots: Snapshots, address: Path, counters: Counters | None = None
) -> grpc.Server:
    """A running server at the socket `address`. Raises InvalidArgument; see `start_at`."""
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"),
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.so_reuseport", 0)],
    )
    waiting = ThreadPoolExecutor(WAITING_THREADS, thread_name_prefix="waiting-rpc")
    add_SnapshotsServicer_to_server(SnapshotsService(snapshots, waiting, counters), server)
    start_at(server, address)  # `root` is locked, so nobody else answers there
    return server


@contextmanager
def _owned(root: Path) -> Iterator[None]:
    """Holds the lock of `root`; the kernel gives it back however the process ends.

    Raises Busy, and what `make_root` raises.
    """
    make_root(root)
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(
                f"another process serves {root}", hint="stop it, or give this one another --root"
            ) from error
        yield
    finally:
        os.close(fd)
