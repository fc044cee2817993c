"""Mounting a snapshot with a private block server, and unmounting it."""

import json
import os
import select
import time
from pathlib import Path
from typing import Any

from imgsnap import errors
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
from imgsnap.mount.process import ProcessId, start_detached
from imgsnap.mount.records import MOUNTED, STARTING, MountRecord, MountRecords
from imgsnap.mount.server_process import MountOptions, OpenRepository, run_server

END_GRACE_S = 10.0
LAZY_GRACE_S = 0.5
_ABORT_GRACE_S = 3.0
_PIPE_READ = 65536

__all__ = ["MountOptions", "mount_snapshot", "mounts", "unmount"]


def mount_snapshot(options: MountOptions, open_repository: OpenRepository) -> MountRecord:
    """Mounts a snapshot on a directory; returns when its tree is usable.

    Forks at once, so call it before any thread exists. `open_repository` runs in the server
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
    pipe = -1
    server: ProcessId | None = None
    try:
        pipe = start_detached(lambda writer: run_server(options, record, open_repository, writer))
        reports = _Reports(pipe, time.monotonic() + options.mount_timeout_s)
        started = reports.next()
        server = ProcessId(int(started["pid"]), int(started["start_time"]))
        answer = reports.next()
        if "error" in answer:
            raise rebuild_error(answer["error"])
    except BaseException:
        _undo(records, record, server)
        raise
    finally:
        if pipe >= 0:
            os.close(pipe)
    return records.get(record.id) or record


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


def rebuild_error(value: dict[str, Any]) -> ImgsnapError:
    """The error that a server reported: of the same class, with message, hint and exit code."""
    found: object = getattr(errors, str(value["class"]), ImgsnapError)
    if not (isinstance(found, type) and issubclass(found, ImgsnapError)):
        found = ImgsnapError
    # Some classes compute their message from other arguments; this one is complete.
    error = found.__new__(found)
    ImgsnapError.__init__(error, str(value["message"]), hint=value["hint"])
    error.exit_code = int(value["exit_code"])
    return error


class _Reports:
    """The lines a server writes, with a deadline for all of them."""

    def __init__(self, pipe: int, deadline: float) -> None:
        self._pipe = pipe
        self._deadline = deadline
        self._buffer = b""
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)

    def next(self) -> dict[str, Any]:
        """Raises ImgsnapError when the server died, Unavailable when it takes too long."""
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise Unavailable("the mount did not complete in time")
            data = os.read(self._pipe, _PIPE_READ)
            if not data:
                raise ImgsnapError("the block server died while it was mounting")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        value: dict[str, Any] = json.loads(line)
        return value


def _absolute(options: MountOptions) -> MountOptions:
    from dataclasses import replace

    rw_root = options.rw_root or options.cache_dir / "rw"
    return replace(
        options,
        target=Path(os.path.realpath(options.target)),
        run_dir=Path(os.path.realpath(options.run_dir)),
        cache_dir=Path(os.path.realpath(options.cache_dir)),
        rw_root=Path(os.path.realpath(rw_root)),
        trace_path=Path(os.path.realpath(options.trace_path)) if options.trace_path else None,
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
        loop="",
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
    if server is not None and not server.wait(_ABORT_GRACE_S):
        server.end(_ABORT_GRACE_S)
    teardown.unmount_tree(record, lazy=True)
    teardown.remove_entry(records, record)
    teardown.remove_instance(record)
