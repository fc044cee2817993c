"""The supervisor: a small process that holds the FUSE device and keeps a block server alive.

The kernel fails a file system's readers only when the last descriptor of its device is closed.
Two processes have it: this one, which does nothing that could fail, and the server it forks,
which does everything. A server that ends is replaced at once, and the kernel is asked to send
again what the old one left unanswered; readers see a pause. If this process is the one that
dies, the next supervisor takes the descriptors back from the server (`take_over`).
"""

import fcntl
import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from imgsnap.fuse.session import FuseSession, negotiate
from imgsnap.mount import attach
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc
from imgsnap.node.block_server import (
    EXIT_ENDED,
    BlockServer,
    ServerSettings,
    run_block_server,
)
from imgsnap.node.devices import OpenRepository

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 5.0
"""Between servers that end before they are ready; one that was ready is replaced at once."""
READY_TIMEOUT_S = 20.0
"""A server that is not ready by then is ended: it hangs."""
_STOP = (signal.SIGTERM, signal.SIGINT)
_OOM_SCORE = -900
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Held:
    """What outlives block servers."""

    device: int  # the open /dev/fuse
    session: FuseSession
    listener: socket.socket  # of the block server's calls: callers wait while it is replaced

    @classmethod
    def create(cls, settings: ServerSettings) -> "Held":
        """Mounts an empty superblock. Raises Unsupported, AccessDenied, OSError."""
        places = settings.places
        places.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        places.device_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        listener = rpc.listen(places.block_socket)
        device = attach.mount_fuse(places.device_dir)
        session = negotiate(device)
        save_session(settings, session)
        return cls(device, session, listener)


def save_session(settings: ServerSettings, session: FuseSession) -> None:
    path = settings.places.session
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(session._asdict()))
    temporary.replace(path)


def load_session(settings: ServerSettings) -> FuseSession:
    """Raises OSError, ValueError."""
    return FuseSession(**json.loads(settings.places.session.read_text()))


@dataclass(slots=True)
class _Child:
    """A block server; `ready` is the reading end of its pipe until it has said so."""

    process: ProcessId
    pidfd: int
    ready: int
    started: float
    ours: bool  # a child of this process, and not one that was taken over
    served: bool  # it has been ready

    def close(self) -> None:
        os.close(self.pidfd)
        if self.ready >= 0:
            os.close(self.ready)


class Supervisor:
    """Runs in a process with one thread: it forks."""

    def __init__(
        self, settings: ServerSettings, held: Held, open_repository: OpenRepository
    ) -> None:
        self._settings = settings
        self._held = held
        self._open_repository = open_repository
        self.starts = 0  # of servers, by this process
        self._child: _Child | None = None
        self._failures = 0
        self._not_before = 0.0
        self._stop = False
        self.kept_from_servers: list[int] = []
        """Descriptors that a forked server closes: what they mean is this process's alone."""
        self._poll = select.poll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        for number in _STOP:
            signal.signal(number, self._on_stop)
        signal.set_wakeup_fd(wake)
        self.watch(self._wake, self._drain)

    def _on_stop(self, number: int, frame: object) -> None:
        self._stop = True

    def _drain(self) -> None:
        os.read(self._wake, 64)

    def stop(self) -> None:
        """Makes `run` return after the current event."""
        self._stop = True

    @property
    def server(self) -> ProcessId | None:
        return self._child.process if self._child is not None else None

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        """Calls `readable` when the descriptor is; until `unwatch`."""
        self._watched[fd] = readable
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        del self._watched[fd]
        self._poll.unregister(fd)

    def run(self) -> bool:
        """Keeps a server running; True when the superblock is gone, False after `stop` and when
        the kernel is too old to outlive a server."""
        protect_from_oom()
        while not self._stop:
            if self._child is None and time.monotonic() >= self._not_before:
                self._start()
            for fd, _ in self._poll.poll(self._timeout_ms()):
                if fd in self._watched:
                    self._watched[fd]()
            child = self._child
            if child is not None and child.ready >= 0 and _late(child):
                _log.error("block server %d is not ready in time; ending it", child.process.pid)
                kill(child.process)
            if self._ended():
                return True
        return False

    def _timeout_ms(self) -> float | None:
        if self._child is None:
            return max(0.0, self._not_before - time.monotonic()) * 1000
        return 1000.0 if self._child.ready >= 0 else None

    # Servers ---------------------------------------------------------------------------------

    def _start(self) -> None:
        """Forks a server, which asks the kernel for unanswered requests as soon as it reads."""
        try:
            child, ready = self._fork()
        except OSError as error:
            # The machine is short of something: this process must outlast that.
            _log.error("cannot start a block server: %s", error)
            self._failures += 1
            self._back_off()
            return
        self.starts += 1
        self._adopt(ProcessId.of(child), ready, ours=True)

    def _fork(self) -> tuple[int, int]:
        """A server's process and the reading end of its pipe. Raises OSError."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        with ExitStack() as its_own:
            its_own.callback(os.close, writer)
            try:
                # Before the fork: a server that lives is never seen without its lock.
                its_own.callback(os.close, lock_as_server(self._settings))
                child = os.fork()
            except OSError:
                os.close(reader)
                raise
            if not child:
                self._run_server(writer)
        return child, reader

    def _back_off(self) -> None:
        delay = BACKOFF_FIRST_S * 2 ** min(self._failures - 1, 10) if self._failures else 0.0
        self._not_before = time.monotonic() + min(delay, BACKOFF_MAX_S)

    def adopt(self, process: ProcessId, *, ours: bool) -> None:
        """Watches over a server that a former supervisor started; `ours` when that was this
        process before it became another program. Raises ProcessLookupError."""
        self._adopt(process, -1, ours=ours)

    def _adopt(self, process: ProcessId, ready: int, *, ours: bool) -> None:
        pidfd = os.pidfd_open(process.pid)
        self._child = _Child(process, pidfd, ready, time.monotonic(), ours, served=ready < 0)
        self.watch(pidfd, lambda: None)  # `_ended` looks
        if ready >= 0:
            self.watch(ready, self._on_ready)

    def _on_ready(self) -> None:
        child = self._child
        if child is None or child.ready < 0:
            return
        self.unwatch(child.ready)
        if os.read(child.ready, 1):
            child.served = True
            took_ms = (time.monotonic() - child.started) * 1000
            _log.info("block server %d is ready after %.0f ms", child.process.pid, took_ms)
        os.close(child.ready)
        child.ready = -1

    def _ended(self) -> bool:
        """Takes note of a server that has ended; True when there is nothing left to serve."""
        child = self._child
        if child is None or not select.select([child.pidfd], [], [], 0)[0]:
            return False
        status = -1
        if child.ours:
            _, raw = os.waitpid(child.process.pid, 0)
            status = os.waitstatus_to_exitcode(raw)
        self._on_ready()  # it may have said so just before it ended
        self.unwatch(child.pidfd)
        child.close()
        self._child = None
        if status == EXIT_ENDED:
            return True
        if not self._held.session.resends:
            # What the server had read and not answered is lost: its readers would wait for ever.
            _log.error("block server %d died, and this kernel cannot resend", child.process.pid)
            os.close(self._held.device)  # the last one: the kernel fails all readers now
            self._stop = True
            return False
        self._failures = 0 if child.served else self._failures + 1
        self._back_off()
        _log.warning("block server %d ended (%d); replacing it", child.process.pid, status)
        return False

    def replace(self) -> None:
        """Ends the server on purpose: `run` starts the next one."""
        if self._child is not None:
            kill(self._child.process)

    def end_server(self) -> None:
        """Ends the server without replacing it."""
        child, self._child = self._child, None
        if child is not None:
            self.unwatch(child.pidfd)
            if child.ready >= 0:
                self.unwatch(child.ready)
            child.process.end(2.0)
            if child.ours:
                os.waitpid(child.process.pid, 0)
            child.close()

    def _run_server(self, ready: int) -> None:
        """In the child: becomes a block server and never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _STOP:
                signal.signal(number, signal.SIG_DFL)
            _set_oom_score(0)
            for fd in (*self._watched, *self.kept_from_servers):
                os.close(fd)
            server = BlockServer(
                self._settings,
                self._held.device,
                self._held.session,
                self._held.listener,
                self._open_repository,
            )
            status = run_block_server(server, ready)
        except BaseException:
            _log.exception("the block server could not start")
        finally:
            logging.shutdown()
            os._exit(status)


def lock_as_server(settings: ServerSettings) -> int:
    """A descriptor that shows that a block server lives, while any process has it open; see
    `server_lives`. Raises OSError."""
    fd = _open_lock(settings)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def server_lives(settings: ServerSettings) -> bool:
    """Whether any block server of this directory runs: connecting would not tell, since the
    service manager keeps their socket open. Raises OSError."""
    fd = _open_lock(settings)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _open_lock(settings: ServerSettings) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    return os.open(settings.places.root / "server.lock", flags, 0o600)


def take_over(settings: ServerSettings) -> tuple[Held, ProcessId]:
    """What a running block server holds, whose supervisor died.

    Raises NobodyListens when there is none, Unavailable when there is one that does not answer:
    the device is then not ours to take.
    """
    answer = rpc.call_for_descriptors(settings.places.block_socket, "take", timeout_s=5.0)
    device, listener = answer.descriptors
    os.set_inheritable(device, False)
    os.set_inheritable(listener, False)
    session = FuseSession(**answer.result["session"])
    held = Held(device, session, socket.socket(fileno=listener))
    return held, ProcessId.of(int(answer.result["pid"]))


def kill(process: ProcessId) -> None:
    if process.alive:
        os.kill(process.pid, signal.SIGKILL)


def protect_from_oom() -> None:
    """The kernel ends a server first, which loses nothing."""
    _set_oom_score(_OOM_SCORE)


def _set_oom_score(score: int) -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(score))
    except OSError as error:
        _log.debug("cannot set the OOM score: %s", error)


def _late(child: _Child) -> bool:
    return time.monotonic() - child.started > READY_TIMEOUT_S
