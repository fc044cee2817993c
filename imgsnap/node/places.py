"""The files of one group of processes: a supervisor and the block server it keeps alive."""

from dataclasses import dataclass
from pathlib import Path

from imgsnap.fuse.files import DEVICE_FILE


@dataclass(frozen=True, slots=True)
class ServerPlaces:
    """::

    <root>/block.sock         calls to the block server; the supervisor keeps it open
    <root>/supervisor.sock    calls to the supervisor
    <root>/attachments/       attachments.py
    <root>/session.json       what INIT agreed on, for a supervisor that takes over
    <device_dir>/<id>/layer.erofs   the FUSE superblock with the devices
    """

    root: Path
    device_dir: Path
    log: Path

    @property
    def block_socket(self) -> Path:
        return self.root / "block.sock"

    @property
    def supervisor_socket(self) -> Path:
        return self.root / "supervisor.sock"

    @property
    def attachments(self) -> Path:
        return self.root / "attachments"

    @property
    def session(self) -> Path:
        return self.root / "session.json"

    def device(self, attachment_id: str) -> Path:
        """The device's file."""
        return self.device_dir / attachment_id / DEVICE_FILE
