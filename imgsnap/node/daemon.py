"""The node daemon's control process: it answers the CLI, and sees that there is a supervisor."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from imgsnap.blockstore.node_cache import remove_tree
from imgsnap.errors import (
    AlreadyExists,
    Busy,
    ImgsnapError,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from imgsnap.mount import linux
from imgsnap.mount.process import ProcessId
from imgsnap.mount.records import MountRecords
from imgsnap.node import rpc, signals, systemd
from imgsnap.node.block_server import start_log
from imgsnap.node.control import Control
from imgsnap.node.places import NodePlaces
from imgsnap.node.policies import check_policy
from imgsnap.node.supervise import command

SUPERVISOR_ANSWER_S = 20.0
SUPERVISOR_START_S = 60.0
"""Until it answers: its block server's start is a part of it. Long, as a process that ends is
noticed at once: only one that hangs is waited for, or a machine that is busy or emulated."""
CONTROL_START_S = 90.0
"""The same for a control process: its supervisor's start is a part of it. It listens before."""
WATCH_S = 2.0
"""How often the supervisor is looked for; readers do not wait for this, only its upgrades do."""
DRAIN_S = 60.0
"""For calls under way before an upgrade: a mount may be waiting for a registry."""
_END_GRACE_S = 10.0
STATE_VARIABLE = "IMGSNAP_CONTROL_SOCKET"
_OURS = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
"""What systemd told this process, and not the ones it starts."""
_STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_log = logging.getLogger(__name__)


def run_daemon(
    run_dir: Path,
    cache_dir: Path,
    cache_quota: int | None,
    metrics: str | None = None,
    policy: Path | None = None,
) -> int:
    """Answers calls until SIGTERM; mounts and the block server stay. SIGUSR2 makes it the program
    that is installed now. `metrics` is an address and port to serve them on, `policy` the file of
    a policy that everything opened must be accepted by.

    Raises AlreadyExists when a daemon runs, Unavailable when there is one that does not answer,
    AccessDenied, OSError, what MetricsServer raises, and what a policy that cannot be used raises.
    """
    if policy is not None:
        check_policy(policy)
    run_dir, cache_dir = Path(os.path.realpath(run_dir)), Path(os.path.realpath(cache_dir))
    signals.block(_STOP)
    linux.name_process("imgsnap-control")
    places = NodePlaces(run_dir)
    MountRecords(run_dir).prepare()
    places.server.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener, passed = _listener(places)
    if metrics:
        try:
            _serve_metrics(metrics, run_dir, cache_dir, cache_quota)
        except ImgsnapError:
            if not passed:
                places.control_socket.unlink(missing_ok=True)
            raise
    control = Control(run_dir, cache_dir, policy)
    ensure_supervisor(places, cache_dir, cache_quota)  # first: undoing asks its block server
    control.mounting.undo_half_done()
    control.know_supervisor()
    server = rpc.Server(listener, control.handlers())
    server.start()
    systemd.notify(os.environ, "READY=1")
    start_log(places.control_log)
    while True:
        number = signals.wait(_STOP, WATCH_S)
        if number is None:
            try:
                ensure_supervisor(places, cache_dir, cache_quota)
                control.look_after()
            except ImgsnapError as error:
                _log.error("%s", error)
            continue
        if number == signal.SIGUSR2:
            server.drain(DRAIN_S)
            _become_new(listener, passed)
        systemd.notify(os.environ, "STOPPING=1")
        if not passed:
            places.control_socket.unlink(missing_ok=True)
        return 0


def _serve_metrics(address: str, run_dir: Path, cache_dir: Path, cache_quota: int | None) -> None:
    from imgsnap.node.metrics_http import MetricsServer, Observer

    MetricsServer(address, Observer(run_dir, cache_dir, cache_quota)).start()


def _listener(places: NodePlaces) -> tuple[socket.socket, bool]:
    """The socket that was kept across an upgrade or passed by systemd, or a new one; whether it is
    systemd's, which goes on listening."""
    kept = os.environ.pop(STATE_VARIABLE, "")
    passed = systemd.take_descriptors(os.environ)
    if kept:
        number, _, owner = kept.partition(":")
        os.set_inheritable(int(number), False)
        return socket.socket(fileno=int(number)), owner == "systemd"
    if passed:
        return socket.socket(fileno=next(iter(passed.values()))), True
    with linux.locked(places.lock("control")):  # of two that start together one finds the other
        try:
            running = rpc.call(places.control_socket, "status", timeout_s=5.0)
        except (rpc.NobodyListens, rpc.Interrupted):
            return rpc.listen(places.control_socket), False
    raise AlreadyExists(
        f"a daemon runs already (pid {running['pid']})", hint="imgsnap daemon status shows it"
    )


def _become_new(listener: socket.socket, passed: bool) -> None:
    os.set_inheritable(listener.fileno(), True)
    owner = "systemd" if passed else "ours"
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP)
    environ = {**os.environ, STATE_VARIABLE: f"{listener.fileno()}:{owner}"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)  # noqa: S606


def ensure_supervisor(places: NodePlaces, cache_dir: Path, cache_quota: int | None) -> None:
    """Starts a supervisor unless one answers. Raises Unavailable when it does not come up."""
    try:
        rpc.call(places.server.supervisor_socket, "status", timeout_s=SUPERVISOR_ANSWER_S)
    except (rpc.NobodyListens, rpc.Interrupted):
        program = command(places.run_dir, cache_dir, cache_quota)
        _start(program, places.server.supervisor_socket, SUPERVISOR_START_S)


def _start(program: list[str], socket: Path, limit_s: float) -> None:
    """Starts a process that outlives this one; returns when it, or another one that somebody else
    started just before, answers at the socket."""
    environ = {k: v for k, v in os.environ.items() if k not in _OURS}
    process = subprocess.Popen(
        program,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        try:
            rpc.call(socket, "status", timeout_s=1.0)
        except Unavailable:
            if process.poll() is not None and not rpc.somebody_listens(socket):
                reason = process.stderr.read().decode() if process.stderr else ""
                raise Unavailable(f"{program[2]} does not start: {reason.strip()}") from None
            time.sleep(0.02)
        else:
            return
    raise Unavailable(f"{program[2]} does not answer")


def ensure_daemon(
    run_dir: Path, cache_dir: Path, cache_quota: int | None, policy: Path | None = None
) -> None:
    """Starts a daemon, as a process of its own that stays, unless one answers.

    One that answers keeps its own policy. Raises Unavailable when it does not come up,
    InvalidArgument when the one that runs has another cache.
    """
    run_dir, cache_dir = Path(os.path.realpath(run_dir)), Path(os.path.realpath(cache_dir))
    socket = NodePlaces(run_dir).control_socket
    try:
        running = rpc.call(socket, "place", timeout_s=CONTROL_START_S)
    except (rpc.NobodyListens, rpc.Interrupted):
        _start(_program(run_dir, cache_dir, cache_quota, policy), socket, CONTROL_START_S)
        return
    if running["cache"] != str(cache_dir):
        raise InvalidArgument(
            f"the daemon of {run_dir} has its cache in {running['cache']}",
            hint="give both the same --cache-dir, or this one a --run-dir of its own",
        )


def _program(
    run_dir: Path, cache_dir: Path, cache_quota: int | None, policy: Path | None
) -> list[str]:
    quota = "" if cache_quota is None else str(cache_quota)
    program = [sys.executable, "-m", "imgsnap.node.daemon"]
    return [*program, str(run_dir), str(cache_dir), quota, str(policy or "")]


def upgrade(run_dir: Path) -> dict[str, object]:
    """Replaces supervisor, block server and control process by what is installed now.

    Raises NotFound when no daemon runs, ImgsnapError when what is installed does not start:
    then nothing has changed.
    """
    places = NodePlaces(Path(os.path.realpath(run_dir)))
    try:
        before = rpc.call(places.control_socket, "status", timeout_s=5.0)
    except rpc.NobodyListens as error:
        raise NotFound("no daemon runs here") from error
    check = subprocess.run(
        [sys.executable, "-m", "imgsnap.node.supervise", "check"], capture_output=True, text=True
    )
    if check.returncode:
        last = (check.stderr.strip().splitlines() or ["no message"])[-1]
        raise ImgsnapError(f"the installed version does not start: {last}")
    old = rpc.call(places.server.supervisor_socket, "status", timeout_s=5.0)
    rpc.call(places.server.supervisor_socket, "upgrade", timeout_s=5.0)
    os.kill(int(before["pid"]), signal.SIGUSR2)
    deadline = time.monotonic() + DRAIN_S + SUPERVISOR_START_S
    while time.monotonic() < deadline:
        time.sleep(0.02)
        try:
            status = rpc.call(places.control_socket, "status", timeout_s=5.0)
        except Unavailable:
            continue
        now = status["supervisor"]
        if (
            now
            and now["server"] not in (None, old["server"])
            and (status["started"] != before["started"])
        ):
            return {"from": before["version"], "to": status["version"], "server": now["server"]}
    raise Unavailable("the daemon does not answer after its upgrade")


def stop_daemon(run_dir: Path, cache_dir: Path, *, force: bool) -> None:
    """Ends control process, supervisor and block server.

    Raises NotFound when none of them runs, Busy while snapshots are mounted or disks in use unless
    `force` takes them away.
    """
    run_dir = Path(os.path.realpath(run_dir))
    places = NodePlaces(run_dir)
    control, supervisor = _pid(places.control_socket), _pid(places.server.supervisor_socket)
    if control is None and supervisor is None:
        raise NotFound("no daemon runs here")
    mounted = [record for record in MountRecords(run_dir).all() if record.by_daemon]
    if mounted and not force:
        raise Busy(
            f"{len(mounted)} snapshots are mounted, for example on {mounted[0].target}",
            hint="unmount them (imgsnap umount --all), or stop with --force",
        )
    from imgsnap.node.ublk_devices import refuse_in_use, remove_disks

    disks = places.server.ublk
    if not force:
        refuse_in_use(disks)
    for record in mounted:
        Control(run_dir, cache_dir).mounting.umount({"target": record.target, "lazy": True})
    if control is not None:
        control.end(_END_GRACE_S)
    if supervisor is not None:
        rpc.call(places.server.supervisor_socket, "stop", timeout_s=5.0, force=force)
        if not supervisor.wait(_END_GRACE_S):
            supervisor.end(_END_GRACE_S)
    for attachment_id in remove_disks(disks):
        remove_tree(places.users(attachment_id))


def _pid(path: Path) -> ProcessId | None:
    try:
        return ProcessId.of(int(rpc.call(path, "status", timeout_s=5.0)["pid"]))
    except (Unavailable, ProcessLookupError):
        return None


def main(arguments: list[str]) -> int:
    """`python -m imgsnap.node.daemon RUN CACHE [QUOTA [POLICY]]`, for `ensure_daemon`; the last two
    may be empty. An older version that is upgraded gives fewer."""
    run_dir, cache_dir, quota, policy = (*arguments, "", "")[:4]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who started us may have blocked some
    try:
        return run_daemon(
            Path(run_dir),
            Path(cache_dir),
            int(quota) if quota else None,
            policy=Path(policy) if policy else None,
        )
    except (ImgsnapError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
