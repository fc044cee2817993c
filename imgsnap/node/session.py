"""Mounting a snapshot with a supervised block server of its own, and unmounting it."""

import json
import logging
import os
import select
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from imgsnap.blockstore.fetcher import DEFAULT_THREADS
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.store import ReadOptions
from imgsnap.errors import (
    AccessDenied,
    AlreadyExists,
    Busy,
    ImgsnapError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from imgsnap.mount import attach, linux, teardown
from imgsnap.mount.overlay import WritableLayer, mount_overlay
from imgsnap.mount.process import ProcessId, start_detached
from imgsnap.mount.records import MOUNTED, STARTING, MountRecord, MountRecords
from imgsnap.node import rpc
from imgsnap.node.attachments import Attachment
from imgsnap.node.block_server import ServerSettings
from imgsnap.node.devices import OpenRepository
from imgsnap.node.direct_mount import find_direct, release
from imgsnap.node.places import ServerPlaces
from imgsnap.node.private import run_private
from imgsnap.node.source import Source
from imgsnap.oci.repository import Platform

END_GRACE_S = 10.0
LAZY_GRACE_S = 0.5
_ABORT_GRACE_S = 3.0
_PIPE_READ = 65536
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What to mount and how. Paths are made absolute by `mount_snapshot`."""

    reference: str  # a tag or digest in the repository
    target: Path
    run_dir: Path
    cache_dir: Path
    platform: Platform | None = None  # None: this machine's, or whatever the snapshot is for
    read_write: bool = False
    rw_root: Path | None = None  # where changes are kept; None: <cache_dir>/rw
    fetch_threads: int = DEFAULT_THREADS
    read: ReadOptions = field(default_factory=ReadOptions)
    mount_timeout_s: float = 300.0
    cache_quota: int | None = None  # bytes; None: the one kept with the cache


def mount_snapshot(
    options: MountOptions, source: Source, open_repository: OpenRepository
) -> MountRecord:
    """Mounts a snapshot on a directory; returns when its tree is usable.

    A snapshot that is complete in the cache is mounted from there, and nothing runs afterwards.
    Else forks at once, so call it before any thread exists. `open_repository` runs in the server
    process, whose working directory is `/` and which has none of this process's descriptors.
    The server lives until `unmount`. Raises AlreadyExists for a target that is one of our
    mounts, InvalidArgument, AccessDenied, and what the server met; then nothing is left mounted.
    """
    if os.geteuid() != 0:
        raise AccessDenied("mounting needs root", hint="run with sudo")
    options = _absolute(options)
    records = MountRecords(options.run_dir)
    try:
        records.prepare()
    except OSError as error:
        raise linux.mount_error(error) from error
    created = _make_target(options.target)
    record = _new_record(options, created)
    try:
        _reserve(records, record)
    except BaseException:
        if created:
            attach.remove_directory(options.target)
        raise
    server: ProcessId | None = None
    try:
        direct = _mount_direct(options, record, records, source, open_repository)
        if direct is not None:
            return direct
        settings = ServerSettings(
            _places(record), options.cache_dir, options.fetch_threads, options.cache_quota
        )
        server = _start_server(settings, record, open_repository, options.mount_timeout_s)
        record = record.with_server(server)
        attachment = _attach(settings.places, options, source)
        record = replace(
            record,
            repository=attachment.repository,
            manifest_digest=attachment.manifest_digest,
            config_digest=attachment.config_digest,
            device=str(settings.places.device(attachment.id)),
        )
        records.update(record)
        record = replace(show(record, local=attachment.local), state=MOUNTED)
        records.update(record)
    except BaseException:
        _undo(records, record, server)
        raise
    return record


def _mount_direct(
    options: MountOptions,
    record: MountRecord,
    records: MountRecords,
    source: Source,
    open_repository: OpenRepository,
) -> MountRecord | None:
    """Mounts a complete snapshot from the cache's files; None when a server is needed."""
    try:
        cache = NodeCache(options.cache_dir, quota=options.cache_quota)
        repository = open_repository(source)
    except ImgsnapError:
        return None  # the server meets it too, and says it
    with closing(repository):
        found = find_direct(cache, repository, options.reference, options.platform)
    if found is None:
        return None
    with closing(found):
        direct = found.record(record, str(options.cache_dir))
        try:
            found.pin(cache, direct)
            records.update(replace(direct, server_pid=record.server_pid))
            mounted = _show_tree(
                direct,
                lambda image, target: attach.mount_erofs_devices(
                    image, target, found.device.mount_options
                ),
            )
        except ImgsnapError as error:
            _log.info("%s is not mounted directly: %s", options.reference, error)
            release(direct, cache)
            teardown.unmount_tree(direct, lazy=True)
            teardown.remove_instance(direct)
            records.update(record)
            return None
    mounted = replace(mounted, state=MOUNTED)
    records.update(mounted)
    return mounted


def _places(record: MountRecord) -> ServerPlaces:
    return ServerPlaces(record.server_dir, record.device_dir, record.log_path)


def _start_server(
    settings: ServerSettings,
    record: MountRecord,
    open_repository: OpenRepository,
    timeout_s: float,
) -> ProcessId:
    """Starts a supervisor; returns when its block server can be called."""
    starter = ProcessId.of(os.getpid())
    pipe = start_detached(
        lambda writer: run_private(settings, record, starter, open_repository, writer)
    )
    try:
        report = _report(pipe, time.monotonic() + timeout_s)
    finally:
        os.close(pipe)
    if "error" in report:
        raise rpc.rebuild_error(report["error"])
    return ProcessId(int(report["pid"]), int(report["start_time"]))


def _attach(places: ServerPlaces, options: MountOptions, source: Source) -> Attachment:
    value = rpc.call_again(
        places.block_socket,
        "attach",
        timeout_s=options.mount_timeout_s,
        source=source.to_json(),
        reference=options.reference,
        platform=str(options.platform) if options.platform else None,
        options=asdict(options.read),
    )
    return Attachment.from_json(value)


def show(record: MountRecord, *, local: bool) -> MountRecord:
    """Mounts the record's device on its target: EROFS, and the overlay over it."""
    attach.tune_readahead(
        record.device_dir, attach.READ_AHEAD_LOCAL_KB if local else attach.READ_AHEAD_LAZY_KB
    )
    return _show_tree(record, attach.mount_erofs)


def _show_tree(
    record: MountRecord, mount_erofs: Callable[[Path, Path], attach.ErofsMount]
) -> MountRecord:
    target = Path(record.target)
    erofs_target = target
    if record.read_write:
        record.lower_dir.mkdir(mode=0o700)
        erofs_target = record.lower_dir
    erofs = mount_erofs(Path(record.device), erofs_target)
    if record.read_write:
        layer = WritableLayer(Path(record.rw_dir))
        layer.create()
        mount_overlay(record.overlay_source, erofs_target, layer, target)
    return replace(record, loop=erofs.loop)


def unmount(target: Path, run_dir: Path, *, lazy: bool = False) -> None:
    """Unmounts a snapshot and removes everything that its mount made.

    Waits until its server has ended; a server that was killed is no obstacle. With `lazy` the
    tree disappears at once and the server ends when its last user does. Raises NotFound for a
    target that is not ours, Busy while it is in use.
    """
    target = Path(os.path.realpath(target))
    records = MountRecords(Path(os.path.realpath(run_dir)))
    record = records.get(records.id_of(target))
    if record is None:
        raise NotFound(
            f"{target} is not a mounted snapshot", hint="list them with `imgsnap mounts`"
        )
    if record.state == STARTING and record.server.alive:
        raise Busy(f"{target} is being mounted", hint="try again in a moment")
    teardown.unmount_tree(record, lazy=lazy)
    if record.direct:
        release(record, NodeCache(Path(record.direct_cache)))
    if lazy and not record.server.wait(LAZY_GRACE_S):
        teardown.remove_entry(records, record)
        return  # the server removes the rest
    if not record.server.wait(END_GRACE_S):
        record.server.end(_ABORT_GRACE_S)
    teardown.remove_entry(records, record)
    teardown.remove_instance(record)


def mounts(run_dir: Path) -> list[MountRecord]:
    """The records of all mounts under a run directory; `record.server.alive` tells dead ones."""
    return [record for record in MountRecords(run_dir).all() if record.state == MOUNTED]


def _report(pipe: int, deadline: float) -> dict[str, Any]:
    """The line that a supervisor writes. Raises ImgsnapError when it died, Unavailable when it
    takes too long."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    buffer = b""
    while b"\n" not in buffer:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise Unavailable("the mount did not complete in time")
        data = os.read(pipe, _PIPE_READ)
        if not data:
            raise ImgsnapError("the supervisor died while it was mounting")
        buffer += data
    value: dict[str, Any] = json.loads(buffer)
    return value


def _absolute(options: MountOptions) -> MountOptions:
    rw_root = options.rw_root or options.cache_dir / "rw"
    return replace(
        options,
        target=Path(os.path.realpath(options.target)),
        run_dir=Path(os.path.realpath(options.run_dir)),
        cache_dir=Path(os.path.realpath(options.cache_dir)),
        rw_root=Path(os.path.realpath(rw_root)),
    )


def _make_target(target: Path) -> bool:
    """Makes sure that the target is a directory; True when it had to be made."""
    try:
        target.mkdir()
        return True
    except FileExistsError:
        if not target.is_dir():
            raise InvalidArgument(f"{target} is not a directory") from None
        return False
    except OSError as error:
        hint = "make its parent directory first" if isinstance(error, FileNotFoundError) else None
        raise NotFound(f"cannot make {target}: {error.strerror}", hint=hint) from error


def _new_record(options: MountOptions, created: bool) -> MountRecord:
    record_id = MountRecords.id_of(options.target)
    instance = f"{record_id}-{os.urandom(3).hex()}"
    rw_dir = str(options.rw_root / instance) if options.read_write and options.rw_root else ""
    own = ProcessId.of(os.getpid())
    return MountRecord(
        id=record_id,
        instance=instance,
        target=str(options.target),
        target_created=created,
        reference=options.reference,
        repository="",
        manifest_digest="",
        config_digest="",
        read_write=options.read_write,
        rw_dir=rw_dir,
        device="",
        loop="",
        by_daemon=False,
        state=STARTING,
        server_pid=own.pid,
        server_start_time=own.start_time,
        created=int(time.time()),
        run_dir=str(options.run_dir),
    )


def _reserve(records: MountRecords, record: MountRecord) -> None:
    """Claims the target. A claim whose process died before anything was mounted is dropped."""
    for _ in range(3):
        if records.reserve(record):
            return
        other = records.get(record.id)
        if other is None:
            continue
        if other.server.alive or teardown.is_mounted(other):
            raise AlreadyExists(
                f"{record.target} already shows {other.repository}@{other.reference}",
                hint=f"unmount it first: imgsnap umount {record.target}",
            )
        teardown.remove_instance(other)
        records.remove(other)
    raise Busy(f"{record.target} is being mounted by others")


def _undo(records: MountRecords, record: MountRecord, server: ProcessId | None) -> None:
    """Leaves nothing of a failed mount behind, also when its server was killed half way."""
    if server is not None:
        server.end(_ABORT_GRACE_S)
    teardown.unmount_tree(record, lazy=True)
    teardown.remove_entry(records, record)
    teardown.remove_instance(record)
