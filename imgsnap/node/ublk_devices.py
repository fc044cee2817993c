"""Attachments as ublk disks: which there are, on disk, and what becomes of them.

::

    <directory>/mark          64 random bits that tell our devices from those of others
    <directory>/<N>.json      /dev/ublkbN: its attachment, and whether it was detached while in use

The kernel keeps a disk, and makes its readers wait, when its server is gone: the next server takes
over what is recorded here. What it does not know, it does not touch.
"""

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imgsnap.errors import AlreadyExists, Busy, ImgsnapError, NotFound
from imgsnap.mount import linux
from imgsnap.mount.process import processes_with_open
from imgsnap.node.attachments import Attachment, AttachmentTable
from imgsnap.node.devices import DeviceCatalog
from imgsnap.ublk.control import UblkControl, block_path
from imgsnap.ublk.device import Loops, UblkDevice, create, drop, take_over

RECOVERY_S = 30.0
"""How long who attaches waits for the disks of a former server."""
_MARK = "mark"
_CHARACTER_DEVICES = Path("/sys/class/ublk-char")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskRecord:
    """One disk. Its shape is the kernel's to tell."""

    number: int  # N of /dev/ublkbN
    attachment: Attachment
    leaving: bool = False  # detached; it goes when nobody has it open any more

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "attachment": self.attachment.to_json(),
            "leaving": self.leaving,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DiskRecord":
        """Raises ImgsnapError for a record of another shape."""
        try:
            attachment = Attachment.from_json(value["attachment"])
            return cls(int(value["number"]), attachment, bool(value["leaving"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ImgsnapError(f"a disk's record is damaged: {error}") from error


class UblkDevices:
    """The disks of a block server. Safe for threads."""

    def __init__(self, directory: Path, table: AttachmentTable, catalog: DeviceCatalog) -> None:
        self._directory = directory
        self._table = table
        self._catalog = catalog
        self._loops = Loops()
        self._control: UblkControl | None = None
        self._lock = threading.Lock()
        self._served: dict[int, UblkDevice] = {}
        self._unsettled: set[int] = set()  # left in use, or not taken over yet
        self._caring = threading.Lock()
        self._recovered = threading.Event()
        if not directory.is_dir():
            self._recovered.set()

    def start_recovery(self) -> None:
        """Takes over, beside the caller, the disks that a former server left."""
        threading.Thread(target=self._recover, name="ublk-recovery", daemon=True).start()

    def publish(self, attachment: Attachment, number: int | None) -> Path:
        """Shows an attachment as a disk, number `number` if that is not None; its path. The same
        again when it has one. Raises AlreadyExists for a number that is taken, Unsupported,
        AccessDenied, ImgsnapError, OSError."""
        self._recovered.wait(RECOVERY_S)
        with self._lock:
            known = _find(self._directory, attachment.id)
            if known is None:
                return self._create(attachment, number)
            if number not in (None, known.number):
                raise AlreadyExists(
                    f"it is attached already, as {block_path(known.number)}",
                    hint="use that, or detach it first",
                )
            return block_path(known.number)

    def _create(self, attachment: Attachment, number: int | None) -> Path:
        content = self._catalog.content(attachment.number)
        if content is None:
            raise NotFound(f"{attachment.id} is not attached")
        mark = read_mark(self._directory)
        device = create(self._driver(), self._loops, content, mark, number)
        self._served[device.number] = device
        _write(self._directory, DiskRecord(device.number, attachment))
        path = block_path(device.number)
        _log.info("%s is %s", path, attachment.manifest_digest)
        return path

    def leave(self, attachment: Attachment, *, lazy: bool) -> bool:
        """Takes an attachment's disk away; False when it only will be, once nobody has it open.

        Raises Busy while somebody has, unless `lazy`.
        """
        self._recovered.wait(RECOVERY_S)
        with self._lock:
            record = _find(self._directory, attachment.id)
            if record is None:
                return True
            try:
                self._remove(record)
                return True
            except Busy:
                if not lazy:
                    raise
            _write(self._directory, replace(record, leaving=True))
            self._unsettled.add(record.number)
            return False

    def look_after(self) -> None:
        """Every few seconds: removes, beside the caller, what was left and is not in use any more,
        and tries again to take over what could not be."""
        self._loops.trim()
        if self._unsettled and self._recovered.is_set() and self._caring.acquire(blocking=False):
            threading.Thread(target=self._care, name="ublk-care", daemon=True).start()

    def abandon(self) -> None:
        """The process ends and another one will serve: from now on no read fails."""
        self._loops.abandon()

    def _care(self) -> None:
        with contextlib.ExitStack() as held:
            held.callback(self._caring.release)
            held.enter_context(self._lock)
            records = [r for r in read_records(self._directory) if r.number in self._unsettled]
            self._unsettled.clear()
            for record in records:
                if record.number not in self._served:
                    self._take_over(record)
                if record.leaving:
                    self._remove_left(record)

    def _remove_left(self, record: DiskRecord) -> None:
        try:
            self._remove(record)
        except Busy:
            self._unsettled.add(record.number)
        else:
            self._released(record)

    def _remove(self, record: DiskRecord) -> None:
        """Raises Busy while it is in use."""
        path = block_path(record.number)
        _refuse(path)
        device = self._served.get(record.number)
        if device is None:
            drop(self._driver(), record.number)
        else:
            try:
                device.remove()
            except OSError as error:
                raise Busy(f"{path}: {error.strerror}") from error
            del self._served[record.number]
        _record_path(self._directory, record.number).unlink(missing_ok=True)

    def _released(self, record: DiskRecord) -> None:
        """A disk that was detached before, or is lost, is gone: so is its attachment."""
        found = self._table.by_number(record.attachment.number)
        if found is not None and found.id == record.attachment.id:
            if not found.detached:  # else its id may be that of a later attachment by now
                self._table.detach(found)
            self._catalog.forgotten(found.number)

    def _driver(self) -> UblkControl:
        if self._control is None:
            self._control = UblkControl()
        return self._control

    # Recovery --------------------------------------------------------------------------------

    def _recover(self) -> None:
        try:
            with self._lock:
                records = list(read_records(self._directory))
                for record in records:
                    self._take_over(record)
                self._drop_unrecorded({record.number for record in records})
        except Exception:
            _log.exception("taking over ublk disks failed")
        finally:
            self._recovered.set()

    def _take_over(self, record: DiskRecord) -> None:
        path, begin = block_path(record.number), time.monotonic()
        try:
            control = self._driver()
            if control.info(record.number).ublksrv_flags != read_mark(self._directory):
                raise NotFound(f"{path} is another's now")
            content = self._catalog.content(self._attachment(record).number)
            if content is None:
                raise NotFound(f"{record.attachment.id} is not attached")
            device = take_over(control, self._loops, content, record.number)
        except NotFound as error:
            _log.error("%s is lost: %s", path, error)
            _record_path(self._directory, record.number).unlink(missing_ok=True)
            self._released(record)
        except (ImgsnapError, OSError) as error:
            _log.error("%s cannot be taken over: %s", path, error)
            self._unsettled.add(record.number)
        else:
            self._served[record.number] = device
            if record.leaving:
                self._unsettled.add(record.number)
            _log.info("took over %s in %.0f ms", path, (time.monotonic() - begin) * 1000)

    def _attachment(self, record: DiskRecord) -> Attachment:
        """As the table has it now, which does not outlive the supervisor and the server both."""
        found = self._table.by_number(record.attachment.number)
        if found is not None and found.id == record.attachment.id:
            return found
        kept = self._table.add(record.attachment)
        _write(self._directory, replace(record, attachment=kept))
        return kept

    def _drop_unrecorded(self, recorded: set[int]) -> None:
        """Removes what a server that was killed while it made a disk left of it."""
        for number in _numbers(_CHARACTER_DEVICES.glob("ublkc*")):
            if number in recorded:
                continue
            with contextlib.suppress(NotFound):
                if self._driver().info(number).ublksrv_flags == read_mark(self._directory):
                    _log.warning("dropping unfinished ublk device %d", number)
                    drop(self._driver(), number)


# Records -----------------------------------------------------------------------------------------


def disk_of(directory: Path, attachment_id: str) -> Path | None:
    """The path of an attachment's disk."""
    found = _find(directory, attachment_id)
    return block_path(found.number) if found is not None else None


def read_records(directory: Path) -> Iterator[DiskRecord]:
    """The readable ones, by number."""
    for path in sorted(directory.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, ImgsnapError):
            yield DiskRecord.from_json(json.loads(path.read_text()))


def read_mark(directory: Path) -> int:
    """The mark of our devices, made when there is none. Raises OSError."""
    path = directory / _MARK
    try:
        return int(path.read_text(), 16)
    except (FileNotFoundError, ValueError):
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _replace(path, secrets.token_hex(8))
        return int(path.read_text(), 16)


def refuse_in_use(directory: Path) -> None:
    """Raises Busy when any disk is in use."""
    for record in read_records(directory):
        _refuse(block_path(record.number))


def remove_disks(directory: Path) -> list[str]:
    """Takes all disks away, also from who has them open, when nobody serves them any more; the
    ids of their attachments."""
    records = list(read_records(directory))
    for record in records:
        with contextlib.suppress(ImgsnapError, OSError):
            control = UblkControl()
            if control.info(record.number).ublksrv_flags == read_mark(directory):
                drop(control, record.number)
        _record_path(directory, record.number).unlink(missing_ok=True)
    return [record.attachment.id for record in records]


def _refuse(path: Path) -> None:
    """Raises Busy when a disk is in use, as far as can be seen from here: claimed by the kernel, or
    open in a process that knows it by its own name."""
    hint = "end what uses it, or detach it with --lazy"
    for point in linux.mount_points():
        if point.source == str(path):
            raise Busy(f"{path} is mounted on {point.target}", hint=hint)
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        users = processes_with_open(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Busy(f"{path} is mounted elsewhere, or part of another disk", hint=hint) from error
    if users:
        raise Busy(f"{path} is open in process {users[0]}", hint=hint)


def _find(directory: Path, attachment_id: str) -> DiskRecord | None:
    for record in read_records(directory):
        if record.attachment.id == attachment_id and not record.leaving:
            return record
    return None


def _write(directory: Path, record: DiskRecord) -> None:
    _replace(_record_path(directory, record.number), json.dumps(record.to_json()))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.replace(path)


def _record_path(directory: Path, number: int) -> Path:
    return directory / f"{number}.json"


def _numbers(paths: Iterator[Path]) -> Iterator[int]:
    for path in paths:
        digits = path.name.removeprefix("ublkc")
        if digits.isdigit():
            yield int(digits)
