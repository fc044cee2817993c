"""Snapshots shown on this node for containerd: mounted through the node daemon, each once.

The daemon's block server outlives this process, and so do its mounts; what is shown is what the
kernel has mounted below `<root>/devices`, so a new process knows it without asking anybody.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.resolve import fetch_snapshot
from imgsnap.digest import Digest, digest_hex
from imgsnap.errors import Busy, NotFound
from imgsnap.mount import attach, linux
from imgsnap.mount.records import MountRecords
from imgsnap.node import client, rpc
from imgsnap.node.daemon import ensure_daemon
from imgsnap.node.places import NodePlaces
from imgsnap.node.policies import admission, policy_text
from imgsnap.oci.reference import RegistryLocation, parse_location
from imgsnap.snapshotter.locks import KeyedLocks
from imgsnap.snapshotter.node_settings import NodeSettings

_log = logging.getLogger(__name__)


class NodeDevices:
    """Implements Devices. Safe for threads."""

    def __init__(self, settings: NodeSettings) -> None:
        self._directory = settings.root / "devices"
        self._settings = settings
        self._places = NodePlaces(Path(os.path.realpath(settings.run_dir)))
        self._records = MountRecords(self._places.run_dir)
        self._locks = KeyedLocks()

    def show(self, repository: str, snapshot: Digest) -> Path:
        """Costs a few system calls when it is shown already, and there is no policy."""
        self._check(repository, snapshot)
        target = self._target(snapshot)
        if self._is_served(snapshot):
            return target
        with self._locks.hold(snapshot):
            if not self._is_served(snapshot):
                self._mount(repository, snapshot, target)
        return target

    def _check(self, repository: str, snapshot: Digest) -> None:
        """Raises NotTrusted when the policy does not accept it. What is shown was accepted once,
        but perhaps in another repository, or by another policy."""
        policy = self._settings.policy
        if policy is None:
            return
        cache = NodeCache(self._settings.cache_dir, quota=self._settings.cache_quota)
        location = parse_location(f"docker://{repository}@{snapshot}")
        assert isinstance(location, RegistryLocation)
        with closing(self._settings.open(location)) as opened:
            manifest = fetch_snapshot(opened, snapshot, cache)
            admission((policy_text(policy),), cache)(opened, snapshot, (manifest,))

    def _is_served(self, snapshot: Digest) -> bool:
        """Whether the directory shows the daemon's EROFS of now, or one without a daemon.

        A daemon that lost its superblock, with supervisor and block server killed at once, mounts
        anew: what was shown from the old one has errors for ever. While either lives, somebody
        listens; that is asked only when the supervisor of the mount's time has gone, because it
        wakes the block server. One without a daemon is no single file, which may be wanted.
        """
        target = self._target(snapshot)
        shown = _file_system(target)
        if shown in (None, _file_system(target.parent)):
            return False
        record = self._records.get(self._records.id_of(target))
        if shown == _file_system(self._places.tree(digest_hex(snapshot))):
            supervised = record is not None and record.server.alive
            return supervised or rpc.somebody_listens(self._places.server.block_socket)
        return record is not None and record.direct and not self._settings.one_file

    def file(self, repository: str, snapshot: Digest) -> Path | None:
        target = Path(os.path.realpath(self.show(repository, snapshot)))
        file = self._places.server.device(digest_hex(snapshot))
        sources = [point.source for point in linux.mount_points() if point.target == target]
        return file if sources and sources[-1] == str(file) else None

    def _mount(self, repository: str, snapshot: Digest, target: Path) -> None:
        options = self._settings.mount_options(repository, snapshot, target)
        # First: it also takes away what a daemon that died altogether has left.
        policy = self._settings.policy
        ensure_daemon(options.run_dir, options.cache_dir, options.cache_quota, policy)
        if _file_system(target) not in (None, _file_system(target.parent)):
            _log.warning("%s is not served as it should be; showing it anew", snapshot)
            self._hide(target)
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        client.mount_by_daemon(options)
        _log.info("%s of %s is shown on %s", snapshot, repository, target)

    def _hide(self, target: Path) -> None:
        """Takes away what containers may still have beneath them: their overlays keep it."""
        try:
            client.unmount(target, self._settings.run_dir, self._settings.cache_dir, lazy=True)
        except NotFound:  # somebody deleted the run directory
            attach.unmount(target, lazy=True)

    def release(self, snapshot: Digest) -> None:
        target = self._target(snapshot)
        with self._locks.hold(snapshot):
            try:
                client.unmount(target, self._settings.run_dir, self._settings.cache_dir)
            except NotFound:
                _log.info("%s was not shown any more, or by nobody we know", snapshot)
                attach.unmount(target)
            try:
                for path in (target, target.parent):
                    if path.is_dir():
                        path.rmdir()
            except OSError as error:  # something else was mounted or put there
                raise Busy(f"{error.filename}: {error.strerror}") from error

    def shown(self) -> Iterator[Digest]:
        """What was shown and not released, also before a restart of the machine."""
        if self._directory.is_dir():
            yield from (Digest(f"sha256:{entry.name}") for entry in self._directory.iterdir())

    def _target(self, snapshot: Digest) -> Path:
        return self._directory / digest_hex(snapshot) / "fs"


def _file_system(path: Path) -> int | None:
    """The device number of what is mounted there; None when there is no such directory."""
    try:
        return path.stat().st_dev
    except FileNotFoundError:
        return None
