"""The node daemon's decisions: attach, show, count users, detach.

It keeps nothing in memory that is not on disk: it may end at any moment and be started again, and
what is mounted does not notice.
"""

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from imgsnap import __version__
from imgsnap.blockstore.read_options import read_options
from imgsnap.errors import Busy, ImgsnapError, InvalidArgument, NotFound, Unavailable
from imgsnap.mount import attach, linux, teardown
from imgsnap.mount.linux import MountFlag
from imgsnap.mount.overlay import WritableLayer, mount_overlay
from imgsnap.mount.process import ProcessId, processes_with_open
from imgsnap.mount.records import MOUNTED, STARTING, MountRecord, MountRecords
from imgsnap.node import rpc
from imgsnap.node.attached_tree import mount_attached
from imgsnap.node.attachments import DISK, UBLK, Attachment
from imgsnap.node.devices import DEVICE_ALIGNMENT
from imgsnap.node.direct_mount import mount_direct, release
from imgsnap.node.places import NodePlaces
from imgsnap.node.source import Source
from imgsnap.node.targets import MountOptions, claim
from imgsnap.oci.platforms import parse_platform
from imgsnap.units import align_up

ATTACH_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 20.0
_SUPERVISOR_WAIT_S = 0.05
_ATTEMPTS = 3
"""At an attachment whose last user goes at the same time."""
_ATTACHED = "attached"
"""The user that stands for `imgsnap attach`."""
_PROCESS = "process-"
"""Begins the user that stands for a process: for as long as that lives."""
_log = logging.getLogger(__name__)


class Control:
    """The operations behind the control socket. Safe for threads."""

    def __init__(self, run_dir: Path, cache_dir: Path) -> None:
        self.places = NodePlaces(run_dir)
        self._run_dir = run_dir
        self._cache_dir = cache_dir
        self._records = MountRecords(run_dir)
        self._started = time.time()
        self._known_supervisor: ProcessId | None = None
        self._locks_lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def handlers(self) -> dict[str, rpc.Handler]:
        return {
            "status": self.status,
            "place": self.place,
            "mount": self.mount,
            "umount": self.umount,
            "attach": self.attach,
            "detach": self.detach,
            "release": self.release,
            "attachments": self.attachments,
        }

    def status(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answers without looking at what is mounted: in milliseconds, however much that is."""
        return {
            "pid": os.getpid(),
            "version": __version__,
            "started": self._started,
            "supervisor": self._supervisor(),
            **self.place({}),
        }

    def place(self, args: dict[str, Any]) -> dict[str, Any]:
        """What a command must know before it asks for a mount; asks nobody."""
        return {"cache": str(self._cache_dir), "namespace": linux.mount_namespace()}

    def _supervisor(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = rpc.call(
                self.places.server.supervisor_socket, "status", timeout_s=CALL_TIMEOUT_S
            )
        except Unavailable:
            return None
        return found

    def _supervisor_process(self) -> ProcessId | None:
        """It is asked once in its life: a mount need not wait for it."""
        known = self._known_supervisor
        if known is None or not known.alive:
            status = self._supervisor()
            known = ProcessId.of(int(status["pid"])) if status is not None else None
            self._known_supervisor = known
        return known

    def attachments(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Every attachment with the number of its users."""
        found: list[dict[str, Any]] = self._block("list")
        for attachment in found:
            users = self.places.users(attachment["id"])
            names = [path.name for path in users.iterdir()] if users.is_dir() else []
            attachment |= {
                "users": len(names),
                "attached": _ATTACHED in names,
                "path": str(self._path(attachment["id"]) or ""),
                "device_size": align_up(attachment["size"], DEVICE_ALIGNMENT),
            }
        return found

    def _block(self, operation: str, timeout_s: float = CALL_TIMEOUT_S, **args: Any) -> Any:
        """Calls the block server; waits for a supervisor that is being started."""
        path = self.places.server.block_socket
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            try:
                return rpc.call_again(path, operation, timeout_s=timeout_s, **args)
            except rpc.NobodyListens:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_SUPERVISOR_WAIT_S)

    # Attaching -------------------------------------------------------------------------------

    def attach(self, args: dict[str, Any]) -> dict[str, Any]:
        """Serves a snapshot's device as a file for VMMs, or `via` ublk as a disk (`number`, if it
        is to be a certain one), until `detach`; as `attachments` has it.

        Once for all of them: who attaches it again gets the same file. With `process` (pid and
        start time) for that process alone: until `release`, or the end of the process.
        """
        user = _user(args)
        self._forget_dead()
        if user == _ATTACHED:
            return self._attach_for(user, args)
        with self._lock(user):  # a release waits for this
            attached = self._attach_for(user, args)
            if not _alive(user):  # it asks for no release any more
                self._leave(attached["id"], user, lazy=True)
            return attached

    def _attach_for(self, user: str, args: dict[str, Any]) -> dict[str, Any]:
        source, ublk = Source.from_json(args["source"]), args.get("via") == "ublk"
        if ublk:
            from imgsnap.ublk.control import check_driver

            check_driver()
        options = replace(self._options({**args, "target": "/"}), run_dir=self._run_dir)
        options = replace(options, read=replace(options.read, disk=True))
        for _ in range(_ATTEMPTS):
            attachment = self._attached(options, source, UBLK if ublk else DISK)
            with self._lock(attachment.id):
                if ublk:
                    with contextlib.suppress(NotFound):  # detached between the two
                        self._block("publish", id=attachment.id, number=args.get("number"))
                path = self._path(attachment.id)
                if path is not None and path.exists():
                    users = self.places.users(attachment.id)
                    users.mkdir(parents=True, exist_ok=True, mode=0o700)
                    (users / user).touch()
                    size = align_up(attachment.size, DEVICE_ALIGNMENT)
                    return {**attachment.to_json(), "path": str(path), "device_size": size}
        raise Busy(f"{options.reference} is being detached by others")

    def detach(self, args: dict[str, Any]) -> None:
        """Takes an attached device's file or disk away. Raises NotFound; Busy while it is open,
        unless `lazy`: who has it open then reads on."""
        attachment_id, lazy = str(args["id"]), bool(args.get("lazy"))
        if "/" in attachment_id or not (self.places.users(attachment_id) / _ATTACHED).exists():
            raise NotFound(f"{attachment_id[:100]} is not attached", hint="imgsnap attachments")
        if not attachment_id.endswith(UBLK):  # of a disk the kernel tells more
            device = self.places.server.device(attachment_id)
            users = [] if lazy else processes_with_open(device)
            if users:
                raise Busy(
                    f"{device} is open in process {users[0]}",
                    hint="end what uses it, or detach it with --lazy",
                )
            lazy = True
        self._leave(attachment_id, _ATTACHED, lazy=lazy)

    def _path(self, attachment_id: str) -> Path | None:
        """The file or disk of an attachment; None when it has no disk now."""
        if attachment_id.endswith(UBLK):
            from imgsnap.node.ublk_devices import disk_of

            return disk_of(self.places.server.ublk, attachment_id)
        return self.places.server.device(attachment_id)

    def release(self, args: dict[str, Any]) -> None:
        """Takes away what was attached for a process alone, after an attach that is under way."""
        user = _user(args)
        with self._lock(user):
            for attachment_id, name in self._users():
                if name == user:
                    self._leave(attachment_id, user, lazy=True)
        with self._locks_lock:
            self._locks.pop(user, None)

    def _forget_dead(self) -> None:
        for attachment_id, user in self._users():
            if user.startswith(_PROCESS) and not _alive(user):
                self._leave(attachment_id, user, lazy=True)

    def _users(self) -> list[tuple[str, str]]:
        """Attachments' ids and their users' names."""
        users = self.places.users("")
        attachments = list(users.iterdir()) if users.is_dir() else []
        return [(found.name, user.name) for found in attachments for user in found.iterdir()]

    def _attached(self, options: MountOptions, source: Source, kind: str = "") -> Attachment:
        return Attachment.from_json(
            self._block(
                "attach",
                ATTACH_TIMEOUT_S,
                source=source.to_json(),
                reference=options.reference,
                platform=str(options.platform) if options.platform else None,
                options=asdict(options.read),
                kind=kind,
            )
        )

    # Mounting --------------------------------------------------------------------------------

    def mount(self, args: dict[str, Any]) -> dict[str, Any]:
        """Shows a snapshot on a directory; the mount's record.

        One that is complete in the cache is mounted from its files, unless the caller wants one
        file. Any other is attached and its EROFS mounted once, however many directories show it:
        they share its page cache.
        """
        wanted = self._options(args)
        with self._target_lock(MountRecords.id_of(Path(os.path.realpath(wanted.target)))):
            return self._mount(wanted, args)

    def _mount(self, wanted: MountOptions, args: dict[str, Any]) -> dict[str, Any]:
        source = Source.from_json(args["source"])
        direct = mount_direct(wanted, source, lambda found: found.open(os.environ))
        if direct is not None:
            return asdict(direct)
        options, record = claim(wanted)
        try:
            record, attachment = self._attach(options, source, record)
            self._show(record, attachment)
            server = self._supervisor_process()
            if server is not None:
                record = record.with_server(server)
            record = replace(record, state=MOUNTED)
            self._records.update(record)
        except BaseException:
            self._remove(self._records.get(record.id) or record, lazy=True)
            raise
        _log.info("mounted %s on %s", record.manifest_digest, record.target)
        return asdict(record)

    def _options(self, args: dict[str, Any]) -> MountOptions:
        platform, rw_root = args.get("platform"), args.get("rw_root")
        try:
            return MountOptions(
                reference=args["reference"],
                target=Path(args["target"]),
                run_dir=self._run_dir,
                cache_dir=self._cache_dir,
                platform=parse_platform(platform) if platform else None,
                read_write=bool(args.get("read_write")),
                rw_root=Path(rw_root) if rw_root else None,
                one_file=bool(args.get("one_file")),
                read=read_options(args.get("options", {})),
            )
        except (KeyError, TypeError) as error:
            raise InvalidArgument(f"not a request to mount: {error}") from error

    def _attach(
        self, options: MountOptions, source: Source, record: MountRecord
    ) -> tuple[MountRecord, Attachment]:
        """Attaches the snapshot and counts this mount among its users."""
        for _ in range(_ATTEMPTS):
            attachment = self._attached(options, source)
            device = self.places.server.device(attachment.id)
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
            with self._lock(attachment.id):
                users = self.places.users(attachment.id)
                users.mkdir(parents=True, exist_ok=True, mode=0o700)
                (users / record.instance).touch()
                if not device.exists():
                    continue  # its last user went between the two
                self._mount_tree(attachment)
            return record, attachment
        raise Busy(f"{options.reference} is being detached by others")

    def _mount_tree(self, attachment: Attachment) -> None:
        tree = self.places.tree(attachment.id)
        tree.mkdir(parents=True, exist_ok=True, mode=0o700)
        if any(point.target == tree for point in linux.mount_points()):
            return
        mount_attached(self.places.server, attachment, tree)

    def _show(self, record: MountRecord, attachment: Attachment) -> None:
        tree, target = self.places.tree(attachment.id), Path(record.target)
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
        known = {_ATTACHED, *(record.instance for record in self._records.all())}
        for attachment_id, user in self._users():
            if user not in known and not _alive(user):
                with contextlib.suppress(ImgsnapError, OSError):
                    self._leave(attachment_id, user, lazy=True)

    def _remove(self, record: MountRecord, *, lazy: bool) -> None:
        in_use = not teardown.unmount_gently(record, lazy=lazy)
        attachment_id = Path(record.device).parent.name if record.device else ""
        if record.direct:
            release(record)
        elif attachment_id:
            self._leave(attachment_id, record.instance, lazy=lazy)
        teardown.remove_entry(self._records, record)
        teardown.remove_instance(record, keep_changes=in_use)

    def _leave(self, attachment_id: str, instance: str, *, lazy: bool) -> None:
        with self._lock(attachment_id):
            users = self.places.users(attachment_id)
            (users / instance).unlink(missing_ok=True)
            try:
                users.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return  # others show it
            tree = self.places.tree(attachment_id)
            with contextlib.suppress(NotFound):  # the directory could not even be made
                attach.unmount(tree, lazy=lazy, retry=True)
            attach.remove_directory(tree)
            try:
                self._block("detach", id=attachment_id, lazy=lazy)
            except NotFound:
                pass
            except Busy:  # a disk: it stays as it was
                users.mkdir(mode=0o700)
                (users / instance).touch()
                raise

    @contextlib.contextmanager
    def _target_lock(self, record_id: str) -> Iterator[None]:
        """One mount or unmount of a target at a time, in this process and in others."""
        directory = self._run_dir / "node" / "locks"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(directory / record_id, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _lock(self, attachment_id: str) -> Iterator[None]:
        with self._locks_lock:
            lock = self._locks.setdefault(attachment_id, threading.Lock())
        with lock:
            yield


def _user(args: dict[str, Any]) -> str:
    """The name of who attaches. Raises InvalidArgument."""
    process = args.get("process")
    if process is None:
        return _ATTACHED
    try:
        pid, start_time = map(int, process)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("a process is its pid and its start time") from error
    return f"{_PROCESS}{pid}-{start_time}"


def _alive(user: str) -> bool:
    """Whether a user is a process that lives."""
    pid, _, start_time = user.removeprefix(_PROCESS).partition("-")
    known = user.startswith(_PROCESS) and pid.isdigit() and start_time.isdigit()
    return known and ProcessId(int(pid), int(start_time)).alive
