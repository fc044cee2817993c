"""The supervisor of one mount's block server: it lives as long as the mount, and cleans up."""

import json
import logging
import os
import signal

from imgsnap.errors import Busy, ImgsnapError
from imgsnap.mount import linux, teardown
from imgsnap.mount.process import ProcessId
from imgsnap.mount.records import STARTING, MountRecord, MountRecords
from imgsnap.node.block_server import ServerSettings, start_log
from imgsnap.node.devices import OpenRepository
from imgsnap.node.rpc import error_value
from imgsnap.node.supervisor import Held, Supervisor

_log = logging.getLogger(__name__)


def run_private(
    settings: ServerSettings,
    record: MountRecord,
    starter: ProcessId,
    open_repository: OpenRepository,
    pipe: int,
) -> None:
    """The process's whole life. Reports one JSON line through `pipe` when the block server can be
    called: {"pid", "start_time"} or {"error"}. Ends when the superblock is gone; a starter that
    dies before the record says MOUNTED takes everything with it.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    linux.name_process("imgsnap-super")
    os.chdir("/")
    records = MountRecords(settings.places.root.parent.parent)
    try:
        start_log(settings.places.log)
        linux.raise_descriptor_limit()
        held = Held.create(settings)
        supervisor = Supervisor(settings, held, open_repository)
    except Exception as error:
        _log.error("cannot serve: %s", error, exc_info=not isinstance(error, ImgsnapError))
        _send(pipe, {"error": error_value(error)})
        teardown.remove_instance(record)
        return
    try:
        _abandon_with(starter, supervisor, records, record)
        process = ProcessId.of(os.getpid())
        _send(pipe, {"pid": process.pid, "start_time": process.start_time})
        os.close(pipe)
        supervisor.run()
    finally:
        _unmount(_own(records, record))  # of a superblock that ended nothing is left
        supervisor.end_server()
        teardown.remove_entry(records, record)
        teardown.remove_instance(record)


def _abandon_with(
    starter: ProcessId, supervisor: Supervisor, records: MountRecords, record: MountRecord
) -> None:
    """Stops when the process that mounts dies half way."""
    try:
        pidfd = os.pidfd_open(starter.pid)
    except ProcessLookupError:
        supervisor.stop()
        return

    def ended() -> None:
        supervisor.unwatch(pidfd)
        os.close(pidfd)
        current = records.get(record.id)
        if current is None or current.instance != record.instance or current.state == STARTING:
            _log.error("the process that was mounting has died; undoing the mount")
            supervisor.stop()

    supervisor.watch(pidfd, ended)


def _own(records: MountRecords, record: MountRecord) -> MountRecord:
    """What is known of this instance; its target may be another's by now."""
    current = records.get(record.id)
    return current if current is not None and current.instance == record.instance else record


def _unmount(record: MountRecord) -> None:
    """Unmounts what is left. Users of the tree lose it: without us it is dead anyway."""
    try:
        teardown.unmount_tree(record, lazy=False)
    except Busy as error:
        _log.warning("%s; detaching it", error)
        teardown.unmount_tree(record, lazy=True)


def _send(pipe: int, value: dict[str, object]) -> None:
    try:
        os.write(pipe, json.dumps(value).encode() + b"\n")
    except OSError as error:  # the starter is gone
        _log.debug("nobody listens: %s", error)
