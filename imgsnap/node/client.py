"""Mounting for commands: through the node daemon when it runs, else with a server of their own.

What mounts by itself is imported only then: a command that asks the daemon starts twice as fast.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgsnap.errors import NotFound, Unavailable
from imgsnap.mount import linux
from imgsnap.mount.records import MOUNTED, MountRecord, MountRecords
from imgsnap.node import rpc
from imgsnap.node.places import NodePlaces

if TYPE_CHECKING:
    from imgsnap.mount.process import ProcessId
    from imgsnap.node.devices import OpenRepository
    from imgsnap.node.request import AttachRequest
    from imgsnap.node.targets import MountOptions

CONNECT_TIMEOUT_S = 5.0
RELEASE_TIMEOUT_S = 20.0


def find_daemon(run_dir: Path, operation: str = "status") -> dict[str, Any] | None:
    """The daemon's status, or what else it is asked; None when none answers."""
    socket = NodePlaces(Path(os.path.realpath(run_dir))).control_socket
    if not socket.exists():
        return None  # the common case costs no import and no system call more
    try:
        found: dict[str, Any] = rpc.call(socket, operation, timeout_s=CONNECT_TIMEOUT_S)
    except Unavailable:
        return None
    return found


def mount(options: "MountOptions", open_repository: "OpenRepository") -> MountRecord:
    """Mounts a snapshot on a directory; see `session.mount_snapshot` for what is raised.

    The daemon is asked when it has the same cache and sees the same mounts as this process. Who
    mounts, takes a snapshot that is complete in the cache from its files: nobody serves it.
    """
    place = find_daemon(options.run_dir, "place")
    if place is not None and _same_place(place, options):
        return mount_by_daemon(options)
    from imgsnap.node.direct_mount import mount_direct
    from imgsnap.node.session import mount_snapshot

    direct = mount_direct(options, open_repository)
    return direct or mount_snapshot(options, open_repository)


def mount_by_daemon(options: "MountOptions") -> MountRecord:
    """As `mount`, by the daemon and nobody else. Raises NobodyListens when none runs."""
    record = rpc.call(
        NodePlaces(Path(os.path.realpath(options.run_dir))).control_socket,
        "mount",
        timeout_s=options.mount_timeout_s,
        **options.request.to_json(),
        target=os.path.realpath(options.target),
        read_write=options.read_write,
        rw_root=str(options.rw_root) if options.rw_root else None,
        one_file=options.one_file,
    )
    return MountRecord(**record)


def attach(
    request: "AttachRequest",
    run_dir: Path,
    cache_dir: Path,
    *,
    cache_quota: int | None = None,
    policy: Path | None = None,
    process: "ProcessId | None" = None,
    via: str = "fuse",
    number: int | None = None,
) -> dict[str, Any]:
    """Has a snapshot's device served as a file for VMMs, or `via` "ublk" as a disk: `path`,
    `device_size`, `id` and what else an attachment's record has.

    A daemon is started when none runs, with this cache, quota and policy (a file), and stays. With
    `process` it is attached for that process alone: until `release`, at most until the process
    ends. Raises what attaching raises, InvalidArgument for a daemon with another cache; for a disk
    Unsupported without the driver, AlreadyExists when the `number` it is to have is taken.
    """
    from imgsnap.node.block_calls import ATTACH_TIMEOUT_S
    from imgsnap.node.daemon import ensure_daemon

    ensure_daemon(run_dir, cache_dir, cache_quota, policy)
    found: dict[str, Any] = rpc.call(
        NodePlaces(Path(os.path.realpath(run_dir))).control_socket,
        "attach",
        timeout_s=ATTACH_TIMEOUT_S,
        **request.to_json(),
        via=via,
        number=number,
        process=[process.pid, process.start_time] if process else None,
    )
    return found


def release(run_dir: Path, process: "ProcessId") -> None:
    """Takes away what was attached for a process; a daemon that is gone does so later."""
    socket = NodePlaces(Path(os.path.realpath(run_dir))).control_socket
    with suppress(Unavailable):
        rpc.call(
            socket,
            "release",
            timeout_s=RELEASE_TIMEOUT_S,
            process=[process.pid, process.start_time],
        )


def _same_place(place: dict[str, Any], options: "MountOptions") -> bool:
    cache = os.path.realpath(options.cache_dir)
    return bool(place["cache"] == cache and place["namespace"] == linux.mount_namespace())


def unmount(target: Path, run_dir: Path, cache_dir: Path, *, lazy: bool = False) -> None:
    """Unmounts what `mount` mounted, also when the daemon is not running now.

    Raises NotFound for a target that is not ours, Busy while it is in use.
    """
    run_dir, target = Path(os.path.realpath(run_dir)), Path(os.path.realpath(target))
    records = MountRecords(run_dir)
    record = records.get(records.id_of(target))
    if record is None or not record.by_daemon:
        from imgsnap.node import session

        session.unmount(target, run_dir, lazy=lazy)
        return
    socket = NodePlaces(run_dir).control_socket
    if find_daemon(run_dir) is not None:
        rpc.call(socket, "umount", timeout_s=60.0, target=str(target), lazy=lazy)
        return
    from imgsnap.node.control import Control

    # The daemon knows nothing that is not on disk: we can do as it would.
    Control(run_dir, cache_dir).mounting.umount({"target": str(target), "lazy": lazy})


def mounts(run_dir: Path) -> list[tuple[MountRecord, bool]]:
    """All mounts under a run directory, by target, and whether somebody serves them."""
    found = [record for record in MountRecords(run_dir).all() if record.state == MOUNTED]
    served = _daemon_serves(run_dir) if any(record.by_daemon for record in found) else False
    return [
        (record, served if record.by_daemon else record.direct or record.server.alive)
        for record in found
    ]


def _daemon_serves(run_dir: Path) -> bool:
    try:
        rpc.call(NodePlaces(run_dir).server.block_socket, "status", timeout_s=CONNECT_TIMEOUT_S)
    except Unavailable:
        return False
    return True


def daemon_call(run_dir: Path, operation: str, **args: Any) -> Any:
    """Asks the daemon. Raises NotFound when none runs."""
    socket = NodePlaces(Path(os.path.realpath(run_dir))).control_socket
    try:
        return rpc.call(socket, operation, **args)
    except Unavailable as error:
        if find_daemon(run_dir) is not None:
            raise
        raise NotFound("no daemon runs here", hint="start one with `imgsnap daemon run`") from error


def attachment_of_mount(target: Path, run_dir: Path) -> tuple[Path, str]:
    """The socket of the block server behind a mounted directory, and the attachment's id.

    Raises NotFound for a target that is not ours or that no server serves.
    """
    run_dir, target = Path(os.path.realpath(run_dir)), Path(os.path.realpath(target))
    records = MountRecords(run_dir)
    record = records.get(records.id_of(target))
    if record is None or record.state != MOUNTED:
        raise NotFound(
            f"{target} is not a mounted snapshot", hint="list them with `imgsnap mounts`"
        )
    if record.direct:
        raise NotFound(f"{target} is mounted from local files: nobody serves it")
    attachment_id = Path(record.device).parent.name
    if record.by_daemon:
        return NodePlaces(run_dir).server.block_socket, attachment_id
    return record.server_dir / "block.sock", attachment_id


def trace_of_mount(target: Path, run_dir: Path) -> str:
    """The trace of a mounted directory's first reads. Raises NotFound, Unavailable."""
    return _trace(*attachment_of_mount(target, run_dir))


def trace_of_attachment(attachment_id: str, run_dir: Path) -> str:
    """The trace of an attached file's first reads. Raises NotFound, Unavailable."""
    places = NodePlaces(Path(os.path.realpath(run_dir)))
    return _trace(places.server.block_socket, attachment_id)


def statistics_of_attachment(attachment_id: str, run_dir: Path) -> dict[str, Any]:
    """What the block server counted for an attachment since it opened it; {} when it has not."""
    socket = NodePlaces(Path(os.path.realpath(run_dir))).server.block_socket
    found = rpc.call_again(socket, "status", timeout_s=CONNECT_TIMEOUT_S)
    counts: dict[str, Any] = found["devices"].get(attachment_id, {})
    return counts


def _trace(socket: Path, attachment_id: str) -> str:
    text: str = rpc.call_again(socket, "trace", timeout_s=CONNECT_TIMEOUT_S, id=attachment_id)
    return text
