"""Mounting a snapshot with a supervised block server of its own, and unmounting it."""

import json
import os
import select
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgsnap.errors import (
    Busy,
    ImgsnapError,
    NotFound,
    Unavailable,
)
from imgsnap.mount import teardown
from imgsnap.mount.process import ProcessId, start_detached
from imgsnap.mount.records import MOUNTED, STARTING, MountRecord, MountRecords
from imgsnap.mount.tree import show_tree
from imgsnap.node import rpc
from imgsnap.node.attached_tree import mount_attached
from imgsnap.node.block_calls import BlockCalls
from imgsnap.node.block_server import ServerSettings
from imgsnap.node.devices import OpenRepository
from imgsnap.node.direct_mount import release
from imgsnap.node.places import ServerPlaces
from imgsnap.node.private import run_private
from imgsnap.node.targets import MountOptions, claim

END_GRACE_S = 10.0
LAZY_GRACE_S = 0.5
_ABORT_GRACE_S = 3.0
_PIPE_READ = 65536


def mount_snapshot(options: MountOptions, open_repository: OpenRepository) -> MountRecord:
    """Mounts a snapshot on a directory; returns when its tree is usable.

    Forks at once, so call it before any thread exists. `open_repository` runs in the server
    process, whose working directory is `/` and which has none of this process's descriptors.
    The server lives until `unmount`. Raises AlreadyExists for a target that is one of our
    mounts, InvalidArgument, AccessDenied, and what the server met; then nothing is left mounted.
    """
    options, record = claim(options)
    records = MountRecords(options.run_dir)
    server: ProcessId | None = None
    try:
        settings = ServerSettings(_places(record), options.cache_dir, options.cache_quota)
        server = _start_server(settings, record, open_repository, options.mount_timeout_s)
        record = record.with_server(server)
        calls = BlockCalls(settings.places.block_socket)
        attachment = calls.attach(options.request, timeout_s=options.mount_timeout_s)
        record = replace(
            record,
            repository=attachment.repository,
            manifest_digest=attachment.manifest_digest,
            config_digest=attachment.config_digest,
            device=str(settings.places.device(attachment.id)),
        )
        records.update(record)
        shown = show_tree(
            record, lambda _, target: mount_attached(settings.places, attachment, target)
        )
        record = replace(shown, state=MOUNTED)
        records.update(record)
    except BaseException:
        _undo(records, record, server)
        raise
    return record


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
    if record.direct:
        in_use = not teardown.unmount_gently(record, lazy=lazy)
        release(record)
        teardown.remove_entry(records, record)
        teardown.remove_instance(record, keep_changes=in_use)
        return
    teardown.unmount_tree(record, lazy=lazy)
    if lazy and not record.server.wait(LAZY_GRACE_S):
        teardown.remove_entry(records, record)
        return  # the server removes the rest
    if not record.server.wait(END_GRACE_S):
        record.server.end(_ABORT_GRACE_S)
    teardown.remove_entry(records, record)
    teardown.remove_instance(record)


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


def _undo(records: MountRecords, record: MountRecord, server: ProcessId | None) -> None:
    """Leaves nothing of a failed mount behind, also when its server was killed half way."""
    if server is not None:
        server.end(_ABORT_GRACE_S)
    teardown.unmount_tree(record, lazy=True)
    teardown.remove_entry(records, record)
    teardown.remove_instance(record)
