"""Attachments: the devices that a block server serves, kept where the next server finds them.

::

    <directory>/number/<n>.json     the record
    <directory>/id/<id>.json        the same file under its other name (a hard link)

One file per attachment, found by either name: a server that starts reads none of them before
the kernel asks. Written by the block server only; a record that exists is whole.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imgsnap.blockstore.read_options import ReadOptions, read_options
from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError
from imgsnap.node.source import Source

RECORD_VERSION = 1
DISK = ".disk"
"""Ends the id of an attachment whose file VMMs read, beside one that EROFS is mounted from."""
UBLK = ".ublk"
"""Ends the id of one that is a disk of its own, and no file."""
ID_LENGTH_MAX = 128


@dataclass(frozen=True, slots=True)
class Attachment:
    """One snapshot's device."""

    number: int  # of the device in the FUSE tree; 0: not yet given
    id: str  # its directory's name: the manifest's digest in hex
    source: Source
    repository: str  # for messages
    manifest_digest: Digest
    config_digest: Digest
    size: int  # bytes
    local: bool  # every chunk was in the cache when it was attached
    exact: bool  # the kernel asks for what is read and no more: for a boot pack, or a trace
    options: ReadOptions
    detached: bool = False  # only the kernel's last references keep it

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        return value | {"version": RECORD_VERSION, "source": self.source.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Attachment":
        """Raises ImgsnapError for a record of another version or shape."""
        try:
            fields = dict(value)
            if fields.pop("version") != RECORD_VERSION:
                raise ValueError("another version")
            source = Source.from_json(fields.pop("source"))
            options = read_options(fields.pop("options"))
            return cls(source=source, options=options, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ImgsnapError(f"an attachment's record is damaged: {error}") from error


class AttachmentTable:
    """The records under a directory. Safe for threads; one process writes."""

    def __init__(self, directory: Path) -> None:
        """Makes the directories. Raises OSError."""
        self._numbers = directory / "number"
        self._ids = directory / "id"
        self._lock = threading.Lock()
        self._last: int | None = None
        for path in (self._numbers, self._ids):
            path.mkdir(parents=True, exist_ok=True, mode=0o700)

    def add(self, attachment: Attachment) -> Attachment:
        """Keeps a record under the next number; the one that is there when its id is taken."""
        with self._lock:
            known = self.by_id(attachment.id)
            if known is not None:
                return known
            numbered = replace(attachment, number=self._next())
            path = self._write(numbered)
            self._id_path(numbered.id).unlink(missing_ok=True)  # of a detached or damaged one
            os.link(path, self._id_path(numbered.id))
            return numbered

    def detach(self, attachment: Attachment) -> None:
        """Takes the id away; the number stays until `remove`."""
        with self._lock:
            self._write(replace(attachment, detached=True))
            self._id_path(attachment.id).unlink(missing_ok=True)

    def remove(self, number: int) -> None:
        with self._lock:
            self._number_path(number).unlink(missing_ok=True)

    def by_id(self, name: str) -> Attachment | None:
        """The attached (not detached) one with this id."""
        if "/" in name or not 0 < len(name) <= ID_LENGTH_MAX:
            return None
        found = _read(self._id_path(name))
        return found if found is not None and not found.detached else None

    def by_number(self, number: int) -> Attachment | None:
        return _read(self._number_path(number))

    def all(self) -> Iterator[Attachment]:
        """Every readable record, by number, also of those that are detached."""
        for number in self._all_numbers():
            found = self.by_number(number)
            if found is not None:
                yield found

    def names(self) -> list[tuple[int, str]]:
        """Numbers and ids of those that are attached."""
        return [(found.number, found.id) for found in self.all() if not found.detached]

    def _all_numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self._numbers.glob("*.json"))

    def _next(self) -> int:
        """Never a number that was used before: the kernel may remember it."""
        mark = self._numbers / "last"
        kept = int(mark.read_text()) if mark.exists() else 0
        if self._last is None:
            self._last = max([kept, *self._all_numbers()])
        self._last = max(self._last, kept) + 1
        self._replace(self._numbers / "last", str(self._last))
        return self._last

    def _write(self, attachment: Attachment) -> Path:
        path = self._number_path(attachment.number)
        self._replace(path, json.dumps(attachment.to_json()))
        return path

    def _replace(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)

    def _number_path(self, number: int) -> Path:
        return self._numbers / f"{number}.json"

    def _id_path(self, name: str) -> Path:
        return self._ids / f"{name}.json"


def _read(path: Path) -> Attachment | None:
    try:
        return Attachment.from_json(json.loads(path.read_text()))
    except (OSError, ValueError, ImgsnapError):
        return None
