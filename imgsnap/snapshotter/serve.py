"""The snapshotter's process: the ledger's only writer, behind a socket."""

import fcntl
import logging
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc

from imgsnap.containerd.api.services.snapshots.v1.snapshots_pb2_grpc import (
    add_SnapshotsServicer_to_server,
)
from imgsnap.containerd.connection import MESSAGE_BYTES_MAX, start_at
from imgsnap.errors import Busy
from imgsnap.node.systemd import notify
from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.directories import Directories
from imgsnap.snapshotter.image_service import ImageService, start_image_service
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.mount_forms import MountForm
from imgsnap.snapshotter.seams import Devices, ImageFinder, LayerUnpacker
from imgsnap.snapshotter.service import SnapshotsService
from imgsnap.snapshotter.snapshots import Snapshots

THREADS = 16
WAITING_THREADS = 64
"""For calls that may wait for a registry."""
STOP_GRACE_S = 10.0
"""For calls under way when the process is asked to end."""
_log = logging.getLogger(__name__)


def serve(
    root: Path,
    address: Path,
    *,
    finder: ImageFinder | None = None,
    devices: Devices | None = None,
    unpacker: LayerUnpacker | None = None,
    form: MountForm = MountForm.OVERLAY,
    image_service: ImageService | None = None,
) -> int:
    """Serves the snapshots in `root` at the socket `address` until SIGTERM or SIGINT.

    Without a finder and devices every image is an ordinary one. With an image service that is
    served too, for credentials. To be called in the main thread.
    Raises Busy when another process serves `root`.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with opened(root, finder=finder, devices=devices, unpacker=unpacker, form=form) as snapshots:
        servers = [start_server(snapshots, address)]
        _log.info("serving %s at %s", root, address)
        if image_service is not None:
            servers.append(start_image_service(image_service))
            _log.info("serving CRI's images at %s", image_service.address)
        notify(os.environ, "READY=1")
        stop.wait()
        notify(os.environ, "STOPPING=1")
        for ended in [server.stop(STOP_GRACE_S) for server in servers]:
            ended.wait()
        address.unlink(missing_ok=True)
        if image_service is not None:
            image_service.address.unlink(missing_ok=True)
    return 0


@contextmanager
def opened(
    root: Path,
    *,
    finder: ImageFinder | None = None,
    devices: Devices | None = None,
    unpacker: LayerUnpacker | None = None,
    form: MountForm = MountForm.OVERLAY,
) -> Iterator[Snapshots]:
    """The snapshots in `root`, recovered, and closed in the end; one process at a time.

    Raises Busy, and what opening the ledger raises.
    """
    with _owned(root):
        ledger = Ledger.open(root)
        try:
            directories = Directories(root)
            claims = Claims(ledger, directories, finder, devices, unpacker)
            snapshots = Snapshots(ledger, directories, claims, form)
            snapshots.recover()
            try:
                yield snapshots
            finally:
                snapshots.close()
        finally:
            ledger.close()


def start_server(snapshots: Snapshots, address: Path) -> grpc.Server:
    """A running server at the socket `address`. Raises InvalidArgument; see `start_at`."""
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="rpc"),
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.so_reuseport", 0)],
    )
    waiting = ThreadPoolExecutor(WAITING_THREADS, thread_name_prefix="waiting-rpc")
    add_SnapshotsServicer_to_server(SnapshotsService(snapshots, waiting), server)
    start_at(server, address)  # `root` is locked, so nobody else answers there
    return server


@contextmanager
def _owned(root: Path) -> Iterator[None]:
    """Holds the lock of `root`; the kernel gives it back however the process ends."""
    root.mkdir(parents=True, mode=0o700, exist_ok=True)
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
