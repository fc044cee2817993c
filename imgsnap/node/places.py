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
    <root>/ublk/              ublk_devices.py
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
    def ublk(self) -> Path:
        return self.root / "ublk"

    @property
    def session(self) -> Path:
        return self.root / "session.json"

    def device(self, attachment_id: str) -> Path:
        """The device's file."""
        return self.device_dir / attachment_id / DEVICE_FILE


@dataclass(frozen=True, slots=True)
class NodePlaces:
    """The node daemon's files under the run directory::

    <run_dir>/control.sock          calls to the daemon
    <run_dir>/node/                 its block server (ServerPlaces), the superblock in node/dev
    <run_dir>/node/tree/<id>        each attachment's EROFS, mounted once for all its users
    <run_dir>/node/locks/           flock(2): by target, and of a daemon that starts
    <run_dir>/node/users/<id>/      one empty file per mount that shows it
    """

    run_dir: Path

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "control.sock"

    @property
    def server(self) -> ServerPlaces:
        root = self.run_dir / "node"
        return ServerPlaces(root, root / "dev", root / "block.log")

    @property
    def control_log(self) -> Path:
        return self.run_dir / "node" / "control.log"

    def tree(self, attachment_id: str) -> Path:
        return self.run_dir / "node" / "tree" / attachment_id

    def lock(self, name: str) -> Path:
        return self.run_dir / "node" / "locks" / name

    def users(self, attachment_id: str) -> Path:
        return self.run_dir / "node" / "users" / attachment_id
