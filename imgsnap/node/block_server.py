"""The block server: the process that answers reads. It may be killed at any time.

Everything it needs to go on is with others: the FUSE device with its supervisor, the attachments
on disk, the bytes in the node cache or the repository.
"""

import json
import logging
import os
import signal
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgsnap.blockstore.cache_pins import Part, Pin, boot_id, snapshot_parts, unpin, write_pin
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.store import BlockStore, Device
from imgsnap.digest import digest_hex
from imgsnap.errors import ImgsnapError, NotFound, Unavailable
from imgsnap.fuse import protocol
from imgsnap.fuse.files import DEVICE_FILE, directory_node
from imgsnap.fuse.server import FuseServer
from imgsnap.fuse.session import FuseSession
from imgsnap.mount import linux
from imgsnap.mount.boot_phase import BootPhase
from imgsnap.node import signals
from imgsnap.node.attachments import UBLK, Attachment, AttachmentTable
from imgsnap.node.devices import DeviceCatalog, OpenRepository, Repositories
from imgsnap.node.places import ServerPlaces
from imgsnap.node.policies import admission
from imgsnap.node.process_usage import process_usage
from imgsnap.node.request import AttachRequest
from imgsnap.node.rpc import Answer, Server

if TYPE_CHECKING:
    from imgsnap.node.ublk_devices import UblkDevices

BOOT_ANSWER_S = 2.0
"""How long an attach waits to learn whether there is a boot pack; mostly it knows by then."""
HOUSEKEEPING_S = 5.0
"""How often overdue reads are failed; a read waits at most this much over its deadline."""
_END_S = 1.0
"""For the FUSE workers after an unmount; they stay in the kernel while a detached tree is used."""
_ENDED = signal.SIGUSR1
"""Sent by the FUSE workers to their own process when the superblock is gone."""
_HANDLED = (signal.SIGTERM, signal.SIGINT, _ENDED)
EXIT_ENDED = 0
"""The superblock is gone: there is nothing to serve any more."""
EXIT_STOPPED = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What every block server of a group is started with."""

    places: ServerPlaces
    cache_dir: Path
    cache_quota: int | None = None  # bytes; None: the one kept with the cache
    pin_holder: str = ""  # begins the names that attached snapshots are pinned in; "": not at all


class BlockServer:
    """One life of the server: from taking over the device to the end of the process."""

    def __init__(
        self,
        settings: ServerSettings,
        device: int,
        session: FuseSession,
        listener: socket.socket,
        open_repository: OpenRepository,
    ) -> None:
        """`device` is the open /dev/fuse."""
        self._settings = settings
        self._fd = device
        self._session = session
        self._listener = listener
        self._store = BlockStore(NodeCache(settings.cache_dir, quota=settings.cache_quota))
        self._repositories = Repositories(open_repository)
        self._table = AttachmentTable(settings.places.attachments)
        self._catalog = DeviceCatalog(self._table, self._store, self._repositories)
        self._ublk: UblkDevices | None = None  # until there is a disk; most servers have none
        self._starts: list[BootPhase] = []
        self._attaching = threading.Lock()
        self._pinning = threading.Lock()

    def run(self, ready: int = -1) -> int:
        """Serves until the superblock is gone (EXIT_ENDED) or a signal ends it.

        A byte is written to the descriptor `ready` when reads are being answered.
        """
        signals.block(_HANDLED)
        own = threading.get_ident()
        fuse = FuseServer(
            self._fd,
            self._catalog,
            self._session,
            on_end=lambda: signal.pthread_kill(own, _ENDED),
        )
        fuse.start()
        if self._settings.places.ublk.is_dir():
            self._disks().start_recovery()
        Server(self._listener, self._handlers()).start()
        if ready >= 0:
            os.write(ready, b"\n")
            os.close(ready)
        ended = self._wait()
        if ended:
            fuse.join(_END_S)
        for served in self._catalog.opened():
            self._log_statistics(served.device)
        if self._ublk is not None:
            self._ublk.abandon()
        self._store.close()
        self._catalog.close()
        self._repositories.close()
        return EXIT_ENDED if ended else EXIT_STOPPED

    def _wait(self) -> bool:
        """True when the superblock is gone."""
        self._store.cache.remove_stale_temporaries()
        self._store.cache.budget.look()
        while True:
            number = signals.wait(_HANDLED, HOUSEKEEPING_S)
            if number is None:
                self._store.fetcher.expire()
                if self._ublk is not None:
                    self._ublk.look_after()
                self._starts = [start for start in self._starts if not start.check()]
                continue
            _log.info("ending on %s", signal.Signals(number).name)
            return number == _ENDED

    def _log_statistics(self, device: Device | None) -> None:
        if device is not None:
            digest = device.snapshot.manifest.digest
            counts = json.dumps(device.reader.statistics.as_dict())
            _log.info("statistics of %s: %s", digest, counts)

    # Calls -----------------------------------------------------------------------------------

    def _handlers(self) -> dict[str, Any]:
        return {
            "attach": self._attach,
            "detach": self._detach,
            "explain": self._explain,
            "list": self._list,
            "publish": self._publish,
            "status": self._status,
            "take": self._take,
            "starting": self._starting,
            "trace": self._trace,
        }

    def _attach(self, args: dict[str, Any]) -> dict[str, Any]:
        """Opens a snapshot and serves its device; the attachment's record."""
        request = AttachRequest.from_json(args)
        # At 0.4 us a read, any device can tell what its start read.
        options = replace(request.read, trace=True)
        device = self._store.open(
            self._repositories.get(request.source),
            request.reference,
            platform=request.platform,
            options=options,
            admit=admission(request.policies, self._store.cache),
        )
        snapshot = device.snapshot
        attachment = Attachment(
            number=0,
            id=digest_hex(snapshot.manifest.digest) + args.get("kind", ""),
            source=request.source,
            repository=snapshot.repository.name,
            manifest_digest=snapshot.manifest.digest,
            config_digest=snapshot.manifest.config.digest,
            size=snapshot.size,
            local=device.reader.local,
            exact=options.exact or _starts_from_pack(device, disk=options.disk),
            options=options,
        )
        parts = snapshot_parts(snapshot)  # the device may be closed by the next line
        with self._attaching:
            kept = self._catalog.add(attachment, device)
        if self._settings.pin_holder:
            # Beside the mount, which need not wait for the disk: until then it is leased.
            threading.Thread(target=self._pin, args=(kept, parts), daemon=True).start()
        _log.info("attached %s", kept.manifest_digest)
        return kept.to_json()

    def _publish(self, args: dict[str, Any]) -> str:
        """Shows an attachment as a ublk disk, if it is not yet; the disk's path."""
        attachment = self._table.by_id(args["id"])
        if attachment is None:
            raise NotFound(f"{args['id']} is not attached")
        return str(self._disks().publish(attachment, args.get("number")))

    def _disks(self) -> "UblkDevices":
        with self._attaching:
            if self._ublk is None:
                from imgsnap.node.ublk_devices import UblkDevices

                self._ublk = UblkDevices(self._settings.places.ublk, self._table, self._catalog)
            return self._ublk

    def _pin(self, attachment: Attachment, parts: frozenset[Part]) -> None:
        """What is attached must open again while the registry is away."""
        digest, holder = attachment.manifest_digest, self._holder(attachment)
        with self._pinning:
            if self._table.by_id(attachment.id) is None:
                return  # detached meanwhile
            try:
                write_pin(self._store.cache, Pin(digest, holder, parts, boot_id(), {}))
            except (ImgsnapError, OSError) as error:
                _log.warning("%s is not pinned: %s", digest, error)

    def _holder(self, attachment: Attachment) -> str:
        """One snapshot may be attached as a tree, as a file and as a disk, each with its pin."""
        return f"{self._settings.pin_holder} {attachment.id}"

    def _detach(self, args: dict[str, Any]) -> None:
        """Takes the device's name away; its bytes are served until the kernel forgets it. Raises
        NotFound; Busy for a ublk disk that is in use, unless `lazy`."""
        attachment = self._table.by_id(args["id"])
        if attachment is None:
            raise NotFound(f"{args['id']} is not attached")
        disk = attachment.id.endswith(UBLK)
        gone = disk and self._disks().leave(attachment, lazy=bool(args.get("lazy")))
        with self._attaching:
            if self._table.by_id(attachment.id) is None:
                raise NotFound(f"{attachment.id} has been detached meanwhile")
            self._table.detach(attachment)
            if self._settings.pin_holder:
                with self._pinning, suppress(NotFound):
                    unpin(self._store.cache, attachment.manifest_digest, self._holder(attachment))
        if disk:
            if gone:
                self._catalog.forgotten(attachment.number)
            return
        known = 0
        directory = directory_node(attachment.number)
        for parent, name in (
            (directory, DEVICE_FILE.encode()),
            (protocol.ROOT_ID, args["id"].encode()),
        ):
            try:
                os.write(self._fd, protocol.inval_entry_notification(parent, name))
                known += 1
            except OSError as error:  # ENOENT: the kernel does not have it in memory
                _log.debug("%s: %s", name, error)
        if not known:
            self._catalog.forgotten(attachment.number)  # FORGET came before, and is not repeated

    def _list(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        return [found.to_json() for found in self._table.all() if not found.detached]

    def _status(self, args: dict[str, Any]) -> dict[str, Any]:
        """Counters of what is open in this life of the server."""
        devices, stalls = {}, {}
        for served in self._catalog.opened():
            device = served.device
            if device is not None:
                devices[served.attachment.id] = device.reader.statistics.as_dict()
                stalls[served.attachment.id] = device.reader.stalls.totals() | {
                    "repository": served.attachment.repository
                }
        return {
            "pid": os.getpid(),
            "threads": threading.active_count(),
            "process": process_usage(os.getpid()),
            "cache": self._store.pool.counts.as_dict(),
            "devices": devices,
            "stalls": stalls,
        }

    def _explain(self, args: dict[str, Any]) -> dict[str, Any]:
        """The stall log of one attachment's device. Nothing of it survives the server, and a
        device that it has not opened yet has none: then `log` is None."""
        attachment = self._table.by_id(args["id"])
        if attachment is None:
            raise NotFound(f"{args['id']} is not attached")
        found = self._catalog.find(attachment.number)
        device = found.device if found is not None else None
        return {
            "manifest_digest": attachment.manifest_digest,
            "repository": attachment.repository,
            "size": attachment.size,
            "local": attachment.local,
            "cache": str(self._settings.cache_dir),
            "statistics": device.reader.statistics.as_dict() if device is not None else {},
            "log": device.reader.stalls.as_dict() if device is not None else None,
        }

    def _starting(self, args: dict[str, Any]) -> None:
        """A tree of an exact device was mounted; `bdi` is its EROFS's, without readahead yet."""
        device = self._opened(args["id"])
        if device.boot is not None:
            self._starts.append(BootPhase(device.boot, args["bdi"]))

    def _trace(self, args: dict[str, Any]) -> str:
        """The first reads of a device so far, as `formats.trace` has them."""
        return self._opened(args["id"]).reader.trace().to_json().decode()

    def _opened(self, attachment_id: str) -> Device:
        """The open device of an attachment. Raises NotFound, Unavailable."""
        attachment = self._table.by_id(attachment_id)
        served = self._catalog.content(attachment.number) if attachment is not None else None
        if served is None:
            raise NotFound(f"{attachment_id} is not attached")
        if served.device is None:
            raise Unavailable(f"{attachment_id} has not been read since its server was replaced")
        return served.device

    def _take(self, args: dict[str, Any]) -> Answer:
        """The FUSE device and the listening socket, for a supervisor whose forerunner died."""
        known = {"pid": os.getpid(), "session": self._session._asdict()}
        return Answer(known, (self._fd, self._listener.fileno()))


def _starts_from_pack(device: Device, *, disk: bool) -> bool:
    """A VMM's kernel asks for more than is read whatever we do; where the pack is here already,
    what it lacks mostly is, too."""
    if device.boot is None:
        return False
    return device.boot.comes(BOOT_ANSWER_S) if disk else device.boot.found(BOOT_ANSWER_S)


def start_log(path: Path) -> None:
    """The log file instead of what the caller had set up, whose descriptors are closed."""
    logging.raiseExceptions = False
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    # A command that logs has given the package a handler of its own, and no way to the root's.
    package = logging.getLogger("imgsnap")
    package.handlers.clear()
    package.propagate = True
    package.setLevel(logging.NOTSET)


def run_block_server(server: BlockServer, ready: int) -> int:
    """The process's whole life after the fork; its exit status."""
    try:
        linux.name_process("imgsnap-block")
        linux.limit_heap()
        return server.run(ready)
    except Exception as error:
        _log.error("the block server ends: %s", error, exc_info=not isinstance(error, ImgsnapError))
        return 1
