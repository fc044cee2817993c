"""Claiming the directory a snapshot is to be mounted on."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from imgsnap.errors import AccessDenied, AlreadyExists, Busy, InvalidArgument, NotFound
from imgsnap.mount import linux, teardown
from imgsnap.mount.process import ProcessId
from imgsnap.mount.records import STARTING, MountRecord, MountRecords
from imgsnap.node.request import AttachRequest


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What to mount and how. Paths are made absolute by `mount_snapshot`."""

    request: AttachRequest
    target: Path
    run_dir: Path
    cache_dir: Path
    read_write: bool = False
    rw_root: Path | None = None  # where changes are kept; None: <cache_dir>/rw
    mount_timeout_s: float = 300.0
    cache_quota: int | None = None  # bytes; None: the one kept with the cache
    one_file: bool = False  # EROFS is over one file with all bytes, though the cache has them all


def claim(options: MountOptions) -> tuple[MountOptions, MountRecord]:
    """Makes sure that the target is a directory and ours: absolute options and a record that says
    STARTING. Undone by removing the record's entry.

    Raises AccessDenied without root, AlreadyExists for a target that is one of our mounts, Busy,
    InvalidArgument, NotFound.
    """
    if os.geteuid() != 0:
        raise AccessDenied("mounting needs root", hint="run with sudo")
    options = _absolute(options)
    records = MountRecords(options.run_dir)
    try:
        records.prepare()
    except OSError as error:
        raise linux.mount_error(error) from error
    record = _new_record(options)
    _reserve(records, record)
    try:
        # Only now: who loses the race for the record must not take the winner's directory away.
        record = replace(record, target_created=_make_target(options.target))
        records.update(record)
    except BaseException:
        records.remove(record)
        raise
    return options, record


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


def _new_record(options: MountOptions) -> MountRecord:
    record_id = MountRecords.id_of(options.target)
    instance = f"{record_id}-{os.urandom(3).hex()}"
    rw_dir = str(options.rw_root / instance) if options.read_write and options.rw_root else ""
    own = ProcessId.of(os.getpid())
    return MountRecord(
        id=record_id,
        instance=instance,
        target=str(options.target),
        target_created=False,
        reference=options.request.reference,
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
