"""The devices a block server serves: opened when they are attached, or when they are first read
after another server had them."""

import logging
import threading
from collections.abc import Callable, Iterable

from imgsnap.blockstore.content import FetchDone
from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.blockstore.store import BlockStore, Device
from imgsnap.errors import ImgsnapError, IntegrityError
from imgsnap.node.attachments import UBLK, Attachment, AttachmentTable
from imgsnap.node.source import Source
from imgsnap.oci.repository import Repository
from imgsnap.units import MIB, align_up

OPENING_MAX = 8
"""Snapshots opened at once: after a restart every one that is in use is asked for."""

DEVICE_ALIGNMENT = 2 * MIB
"""Of the size of a device's file: virtio-pmem maps whole huge pages."""

OpenRepository = Callable[[Source], Repository]
_log = logging.getLogger(__name__)


class Repositories:
    """Open repositories by source: attachments of one place share its connections."""

    def __init__(self, open_repository: OpenRepository) -> None:
        self._open = open_repository
        self._lock = threading.Lock()
        self._known: dict[Source, Repository] = {}

    def get(self, source: Source) -> Repository:
        """Raises what opening raises."""
        with self._lock:
            found = self._known.get(source)
            if found is None:
                found = self._known[source] = self._open(source)
            return found

    def close(self) -> None:
        with self._lock:
            for repository in self._known.values():
                repository.close()
            self._known.clear()


class ServedDevice:
    """One attachment as a file's content. Its size is known before its snapshot is opened."""

    def __init__(self, attachment: Attachment, open_device: Callable[[Attachment], Device]) -> None:
        self.attachment = attachment
        self.size = align_up(attachment.size, DEVICE_ALIGNMENT)
        """Zeros follow the snapshot."""
        self.exact = attachment.exact and not attachment.options.disk
        self.device: Device | None = None
        self._open_device = open_device
        self._lock = threading.Lock()
        self._waiting: list[Callable[[BaseException | None], None]] | None = None
        self._failures = RateLimit(_log)

    def read_into(self, view: memoryview, offset: int) -> bool:
        device = self.device
        if device is None:
            return False
        if offset + len(view) <= self.attachment.size:
            return device.reader.read_into(view, offset)
        inside = max(0, self.attachment.size - offset)
        view[inside:] = bytes(len(view) - inside)
        return not inside or device.reader.read_into(view[:inside], offset)

    def fetch(self, offset: int, length: int, done: FetchDone) -> None:
        device = self.device
        if device is not None:
            # What is all padding needs no fetch: read_into has answered it.
            inside = min(length, self.attachment.size - offset)
            padded = done if inside == length else _padded(done, length)
            device.reader.fetch(offset, inside, padded)
            return

        def opened(error: BaseException | None) -> None:
            if error is not None:
                done(None, error)
            else:
                self._fetch_opened(offset, length, done)

        self.open(opened)

    def _fetch_opened(self, offset: int, length: int, done: FetchDone) -> None:
        view = memoryview(bytearray(length))
        try:
            here = self.read_into(view, offset)
        except (ImgsnapError, OSError) as error:
            done(None, error)
            return
        if here:
            done(view, None)
        else:
            self.fetch(offset, length, done)

    def open(self, opened: Callable[[BaseException | None], None]) -> None:
        """Opens the snapshot if it is not open, in a thread that all who wait share."""
        with self._lock:
            if self.device is None and self._waiting is not None:
                self._waiting.append(opened)
                return
            start = self.device is None
            if start:
                self._waiting = [opened]
        if start:
            threading.Thread(target=self._open, name="open-device", daemon=True).start()
        else:
            opened(None)

    def adopt(self, device: Device) -> bool:
        """Takes a device that was opened elsewhere; False when it has or opens one itself."""
        with self._lock:
            if self.device is not None or self._waiting is not None:
                return False
            self.device = device
            return True

    def _open(self) -> None:
        failure: BaseException | None = None
        device: Device | None = None
        try:
            device = self._open_device(self.attachment)
            if device.reader.size != self.attachment.size:
                raise IntegrityError(
                    f"{self.attachment.manifest_digest} is {device.reader.size} bytes now; "
                    f"it was {self.attachment.size} when it was attached"
                )
        except BaseException as error:
            failure = error
            self._failures.log(
                logging.ERROR, "cannot open %s: %s", self.attachment.manifest_digest, error
            )
        with self._lock:
            if failure is None:
                self.device = device
            waiting, self._waiting = self._waiting or [], None
        for opened in waiting:
            opened(failure)

    def close(self) -> None:
        """The kernel has no reference any more, or the process ends: nobody reads."""
        device, self.device = self.device, None
        if device is not None:
            device.close()


def _padded(done: FetchDone, length: int) -> FetchDone:
    """Adds zeros to what was fetched, up to a length."""

    def fetched(data: memoryview | None, error: BaseException | None) -> None:
        if data is not None:
            data = memoryview(bytes(data) + bytes(length - len(data)))
        done(data, error)

    return fetched


class DeviceCatalog:
    """The attachments of a table as the files of a FUSE superblock."""

    def __init__(
        self, table: AttachmentTable, store: BlockStore, repositories: Repositories
    ) -> None:
        self._table = table
        self._store = store
        self._repositories = repositories
        self._lock = threading.Lock()
        self._devices: dict[int, ServedDevice] = {}
        self._opening = threading.BoundedSemaphore(OPENING_MAX)

    # For the FUSE server ---------------------------------------------------------------------

    def number(self, name: str) -> int | None:
        found = None if name.endswith(UBLK) else self._table.by_id(name)
        return found.number if found is not None else None

    def content(self, number: int) -> ServedDevice | None:
        known = self._devices.get(number)
        return known if known is not None else self._known_since(number)

    def names(self) -> Iterable[tuple[int, str]]:
        return [found for found in self._table.names() if not found[1].endswith(UBLK)]

    def forgotten(self, number: int) -> None:
        with self._lock:
            record = self._table.by_number(number)
            if record is None or not record.detached:
                return  # the kernel only needed memory; it will ask again
            device = self._devices.pop(number, None)
            self._table.remove(number)
        if device is not None:
            device.close()
        _log.info("released %s", record.manifest_digest)

    # For the block server --------------------------------------------------------------------

    def add(self, attachment: Attachment, device: Device) -> Attachment:
        """Serves an opened device; the attachment that is there already when it is known."""
        with self._lock:
            kept = self._table.add(attachment)
            served = self._devices.get(kept.number)
            if served is None:
                served = self._devices[kept.number] = ServedDevice(kept, self._open)
        if not served.adopt(device):
            device.close()
        return kept

    def opened(self) -> list[ServedDevice]:
        with self._lock:
            return [served for served in self._devices.values() if served.device is not None]

    def find(self, number: int) -> ServedDevice | None:
        """A device that was asked for in this life of the server, open or not."""
        with self._lock:
            return self._devices.get(number)

    def close(self) -> None:
        """After the fetcher is closed."""
        with self._lock:
            devices = list(self._devices.values())
            self._devices.clear()
        for device in devices:
            device.close()

    def _known_since(self, number: int) -> ServedDevice | None:
        """A device that a former server had attached."""
        record = self._table.by_number(number)
        if record is None:
            return None
        with self._lock:
            return self._devices.setdefault(number, ServedDevice(record, self._open))

    def _open(self, attachment: Attachment) -> Device:
        with self._opening:
            return self._store.open(
                self._repositories.get(attachment.source),
                attachment.manifest_digest,
                options=attachment.options,
            )
