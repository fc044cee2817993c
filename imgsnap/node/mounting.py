"""The node daemon's mounts: a snapshot's EROFS once, shown on any number of directories."""

import contextlib
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from imgsnap.errors import Busy, ImgsnapError, InvalidArgument, NotFound
from imgsnap.mount import linux, teardown
from imgsnap.mount.linux import MountFlag
from imgsnap.mount.overlay import WritableLayer, mount_overlay
from imgsnap.mount.process import ProcessId
from imgsnap.mount.records import MOUNTED, STARTING, MountRecord, MountRecords
from imgsnap.node.attached_tree import mount_attached
from imgsnap.node.attachments import Attachment
from imgsnap.node.block_calls import BlockCalls
from imgsnap.node.direct_mount import mount_direct, release
from imgsnap.node.places import NodePlaces
from imgsnap.node.policies import DaemonPolicy
from imgsnap.node.request import AttachRequest
from imgsnap.node.targets import MountOptions, claim
from imgsnap.node.users import Users

_ATTEMPTS = 3
"""At an attachment whose last user goes at the same time."""
_log = logging.getLogger(__name__)


class Mounting:
    """The control process's calls for mounts. Safe for threads."""

    def __init__(
        self,
        places: NodePlaces,
        cache_dir: Path,
        block: BlockCalls,
        users: Users,
        supervisor: Callable[[], ProcessId | None],
        policy: DaemonPolicy,
    ) -> None:
        self._places = places
        self._cache_dir = cache_dir
        self._block = block
        self._users = users
        self._supervisor = supervisor
        self._policy = policy
        self._records = MountRecords(places.run_dir)

    def mount(self, args: dict[str, Any]) -> dict[str, Any]:
        """Shows a snapshot on a directory; the mount's record.

        One that is complete in the cache is mounted from its files, unless the caller wants one
        file. Any other is attached and its EROFS mounted once, however many directories show it:
        they share its page cache.
        """
        wanted = self._options(args)
        with self._target_lock(MountRecords.id_of(Path(os.path.realpath(wanted.target)))):
            direct = mount_direct(wanted, lambda source: source.open(os.environ))
            return asdict(direct or self._mount(wanted))

    def _options(self, args: dict[str, Any]) -> MountOptions:
        rw_root = args.get("rw_root")
        try:
            return MountOptions(
                self._policy.bind(AttachRequest.from_json(args)),
                target=Path(args["target"]),
                run_dir=self._places.run_dir,
                cache_dir=self._cache_dir,
                read_write=bool(args.get("read_write")),
                rw_root=Path(rw_root) if rw_root else None,
                one_file=bool(args.get("one_file")),
            )
        except (KeyError, TypeError) as error:
            raise InvalidArgument(f"not a request to mount: {error}") from error

    def _mount(self, wanted: MountOptions) -> MountRecord:
        options, record = claim(wanted)
        try:
            record, attachment = self._attach(options.request, record)
            self._show(record, attachment)
            server = self._supervisor()
            if server is not None:
                record = record.with_server(server)
            record = replace(record, state=MOUNTED)
            self._records.update(record)
        except BaseException:
            self._remove(self._records.get(record.id) or record, lazy=True)
            raise
        _log.info("mounted %s on %s", record.manifest_digest, record.target)
        return record

    def _attach(
        self, request: AttachRequest, record: MountRecord
    ) -> tuple[MountRecord, Attachment]:
        """Attaches the snapshot and counts this mount among its users."""
        for _ in range(_ATTEMPTS):
            attachment = self._block.attach(request)
            device = self._places.server.device(attachment.id)
            record = replace(
                record,
                by_daemon=True,
                repository=attachment.repository,
                manifest_digest=attachment.manifest_digest,
                config_digest=attachment.config_digest,
                device=str(device),
            )
            # First, so that whoever undoes this mount knows what it took.
            self._records.update(record)
            with self._users.lock(attachment.id):
                self._users.join(attachment.id, record.instance)
                if not device.exists():
                    continue  # its last user went between the two
                self._mount_tree(attachment)
            return record, attachment
        raise Busy(f"{request.reference} is being detached by others")

    def _mount_tree(self, attachment: Attachment) -> None:
        tree = self._places.tree(attachment.id)
        tree.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(point.target == tree for point in linux.mount_points()):
            return
        mount_attached(self._places.server, attachment, tree)

    def _show(self, record: MountRecord, attachment: Attachment) -> None:
        tree, target = self._places.tree(attachment.id), Path(record.target)
        if record.read_write:
            layer = WritableLayer(Path(record.rw_dir))
            layer.create()
            mount_overlay(record.overlay_source, tree, layer, target)
            return
        try:
            linux.mount(str(tree), target, "none", MountFlag.BIND)
        except OSError as error:
            raise linux.mount_error(error) from error

    def umount(self, args: dict[str, Any]) -> None:
        """Takes a snapshot off a directory; the last user's end detaches it."""
        target = Path(os.path.realpath(args["target"]))
        record_id = self._records.id_of(target)
        with self._target_lock(record_id):
            record = self._records.get(record_id)
            if record is None or not record.by_daemon:
                raise NotFound(f"{target} is not a snapshot that this daemon mounted")
            self._remove(record, lazy=bool(args.get("lazy")))

    def undo_half_done(self) -> None:
        """Takes back the mounts that a control process left half done when it was killed or
        replaced, and the users that no mount stands behind."""
        for record in list(self._records.all()):
            # What has our own pid is our forerunner's, before it became this program.
            own = record.server_pid == os.getpid()
            dead = record.by_daemon and not record.server.alive
            if record.state == STARTING and (own or dead):
                with contextlib.suppress(ImgsnapError):
                    self._remove(record, lazy=True)
        self._users.forget_unknown({record.instance for record in self._records.all()})

    def _remove(self, record: MountRecord, *, lazy: bool) -> None:
        in_use = not teardown.unmount_gently(record, lazy=lazy)
        attachment_id = Path(record.device).parent.name if record.device else ""
        if record.direct:
            release(record)
        elif attachment_id:
            self._users.leave(attachment_id, record.instance, lazy=lazy)
        teardown.remove_entry(self._records, record)
        teardown.remove_instance(record, keep_changes=in_use)

    def _target_lock(self, record_id: str) -> AbstractContextManager[None]:
        """One mount or unmount of a target at a time, in this process and in others."""
        return linux.locked(self._places.lock(record_id))
