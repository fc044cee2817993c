"""Mount records: one small file per mount, so that any process can list and undo them.

::

    <run dir>/mounts/<id>.json      the record; <id> is derived from the target
    <run dir>/dev/<instance>/       the FUSE superblock of a private block server
    <run dir>/lower/<instance>/     EROFS, when the target shows an overlay
    <run dir>/server/<instance>/    a private block server's sockets and attachments
    <run dir>/log/<instance>.log    its log

An instance is one mount of an id; a lazily unmounted one may outlive its record.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from imgsnap.errors import ImgsnapError
from imgsnap.mount.process import ProcessId

RECORD_VERSION = 2
STARTING, MOUNTED = "starting", "mounted"


@dataclass(frozen=True, slots=True)
class MountRecord:
    """What is mounted where, and who serves it. Paths are absolute."""

    id: str
    instance: str
    target: str
    target_created: bool  # we made the directory and remove it again
    reference: str
    repository: str
    manifest_digest: str
    config_digest: str
    read_write: bool
    rw_dir: str  # of the overlay's changes; "" when read-only
    device: str  # the file below EROFS; "" until it is attached
    loop: str  # the loop device, when EROFS could not use the file
    by_daemon: bool  # the node daemon's block server serves it, not a private one
    state: str  # STARTING until the tree is usable
    server_pid: int  # of the supervisor
    server_start_time: int
    created: int  # seconds since the epoch
    run_dir: str
    direct_cache: str = ""  # the node cache whose files the kernel reads itself; "": it is served

    @property
    def direct(self) -> bool:
        """Whether no process serves it."""
        return bool(self.direct_cache)

    @property
    def server(self) -> ProcessId:
        return ProcessId(self.server_pid, self.server_start_time)

    @property
    def device_dir(self) -> Path:
        return Path(self.run_dir, "dev", self.instance)

    @property
    def lower_dir(self) -> Path:
        return Path(self.run_dir, "lower", self.instance)

    @property
    def server_dir(self) -> Path:
        return Path(self.run_dir, "server", self.instance)

    @property
    def log_path(self) -> Path:
        return Path(self.run_dir, "log", f"{self.instance}.log")

    @property
    def overlay_source(self) -> str:
        """What mountinfo names as the overlay's source."""
        return f"imgsnap-{self.instance}"

    def with_server(self, server: ProcessId) -> "MountRecord":
        return replace(self, server_pid=server.pid, server_start_time=server.start_time)


class MountRecords:
    """The records under one run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._directory = run_dir / "mounts"

    def prepare(self) -> None:
        """Makes the directories. Raises OSError."""
        for name in ("mounts", "dev", "lower", "server", "log"):
            (self.run_dir / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    @staticmethod
    def id_of(target: Path) -> str:
        """The id of the mount at this (resolved) path: there can be one only."""
        return hashlib.sha256(os.fsencode(target)).hexdigest()[:16]

    def _path(self, record_id: str) -> Path:
        return self._directory / f"{record_id}.json"

    def reserve(self, record: MountRecord) -> bool:
        """Writes a record that must not exist yet; False when it does."""
        temporary = self._write(record)
        try:
            os.link(temporary, self._path(record.id))
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def update(self, record: MountRecord) -> None:
        self._write(record).replace(self._path(record.id))

    def _write(self, record: MountRecord) -> Path:
        temporary = self._directory / f".{record.instance}.{os.getpid()}"
        temporary.write_text(json.dumps({"version": RECORD_VERSION} | asdict(record)))
        return temporary

    def get(self, record_id: str) -> MountRecord | None:
        """Raises ImgsnapError for a record that cannot be read."""
        try:
            text = self._path(record_id).read_text()
        except FileNotFoundError:
            return None
        try:
            value = json.loads(text)
            if value.pop("version") != RECORD_VERSION:
                raise ValueError("another version")
            return MountRecord(**value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ImgsnapError(
                f"mount record {self._path(record_id)} is damaged: {error}",
                hint="unmount by hand with umount(8) and delete the record",
            ) from error

    def remove(self, record: MountRecord) -> None:
        """Deletes the record if it is still this instance's."""
        with contextlib.suppress(ImgsnapError, FileNotFoundError):
            current = self.get(record.id)
            if current is not None and current.instance == record.instance:
                self._path(record.id).unlink()

    def all(self) -> Iterator[MountRecord]:
        """Every readable record, sorted by target."""
        found = []
        for path in self._directory.glob("*.json"):
            with contextlib.suppress(ImgsnapError):
                record = self.get(path.stem)
                if record is not None:
                    found.append(record)
        yield from sorted(found, key=lambda record: record.target)
