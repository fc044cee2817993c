"""The node daemon's supervisor, as a process: `python -m imgsnap.node.supervise RUN CACHE [QUOTA]`.

It starts from what it finds: descriptors kept across its own upgrade, those in systemd's store,
those of a block server whose supervisor died, or nothing. A service manager or the control
daemon starts it again if it ends; block server and readers do not notice.
"""

import contextlib
import fcntl
import importlib
import json
import logging
import os
import signal
import socket
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imgsnap import __version__
from imgsnap.blockstore.node_cache import remove_tree
from imgsnap.errors import Busy, ImgsnapError, Unavailable
from imgsnap.fuse.session import FuseSession
from imgsnap.mount import attach, linux
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc, systemd
from imgsnap.node.attachments import UBLK
from imgsnap.node.block_server import ServerSettings, start_log
from imgsnap.node.places import NodePlaces
from imgsnap.node.source import Source
from imgsnap.node.supervisor import (
    Held,
    Supervisor,
    load_session,
    server_lives,
    take_over,
)
from imgsnap.oci.repository import Repository

STATE_VARIABLE = "IMGSNAP_SUPERVISOR_STATE"
PIN_HOLDER = "daemon"
FUSE_NAME, BLOCK_NAME = "imgsnap-fuse", "imgsnap-block"
_PRELOADED = (
    "encodings.idna",
    "blake3",
    "zstandard",
    "http.client",
    "ssl",
    "urllib3",
    "imgsnap.blockstore.boot_stream",
    "imgsnap.formats.block_tree",
    "imgsnap.formats.boot_pack",
    "imgsnap.blockstore.touches",
    "imgsnap.oci.mirrors",
    "imgsnap.oci.registry",
    "imgsnap.oci.layout",
)
"""Imported before the first fork: every server shares them, and the next one is ready at once."""
_CALLER_S = 1.0
_TAKE_ATTEMPTS = 6
"""Half a minute for a server that is too busy to answer."""
_log = logging.getLogger(__name__)


class NodeSupervisor:
    """A supervisor that can be called, and replaced by a newer version of itself."""

    def __init__(self, places: NodePlaces, cache_dir: Path, cache_quota: int | None) -> None:
        self._places = places
        self._settings = ServerSettings(
            places.server, cache_dir, cache_quota=cache_quota, pin_holder=PIN_HOLDER
        )
        self._socket: socket.socket
        self._lock_fd = -1
        self._held: Held
        self._supervisor: Supervisor
        self._next = "end"  # after `run`: "end" or "upgrade"

    def start(self) -> None:
        """Takes over what there is, or mounts a new superblock. Raises ImgsnapError, OSError."""
        kept = os.environ.pop(STATE_VARIABLE, "")
        passed = systemd.take_descriptors(os.environ)
        server: ProcessId | None = None
        if kept:
            state = json.loads(kept)
            self._held = Held(
                state["device"],
                FuseSession(**state["session"]),
                socket.socket(fileno=state["listener"]),
            )
            self._socket = socket.socket(fileno=state["socket"])
            self._lock_fd = state["lock"]
            for name in ("device", "listener", "socket", "lock"):
                os.set_inheritable(state[name], False)
            server = ProcessId(**state["server"]) if state["server"] else None
            _log.info("upgraded to %s", __version__)
        else:
            self._places.server.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock_fd = self._lock()
            self._held, server = self._find(passed)
            self._socket = rpc.listen(self._places.server.supervisor_socket)
        self._store(passed)
        self._supervisor = Supervisor(self._settings, self._held, open_source)
        self._supervisor.kept_from_servers.append(self._lock_fd)
        self._supervisor.watch(self._socket.fileno(), self._answer)
        if server is not None:
            if kept:
                # An older version's server, and a child of ours: exec keeps the pid.
                self._supervisor.adopt(server, ours=True)
                self._supervisor.replace()
            else:
                self._supervisor.adopt(server, ours=False)

    def _store(self, unused: dict[str, int]) -> None:
        """Leaves the descriptors with the service manager, in the place of older ones."""
        for name, fd in unused.items():
            systemd.notify(os.environ, f"FDSTOREREMOVE=1\nFDNAME={name}")
            os.close(fd)
        for name, fd in ((FUSE_NAME, self._held.device), (BLOCK_NAME, self._listener)):
            systemd.store_descriptor(os.environ, name, fd)

    @property
    def _listener(self) -> int:
        return self._held.listener.fileno()

    def _find(self, passed: dict[str, int]) -> tuple[Held, ProcessId | None]:
        """What a living block server holds, else what the service manager kept, else new.

        Raises Unavailable when there is a server that does not answer: two servers must never read
        one device, and what it serves must not be taken away.
        """
        if server_lives(self._settings):
            held, server = self._take_over()
            _log.info("took over block server %d", server.pid)
            return held, server
        if FUSE_NAME in passed and BLOCK_NAME in passed:
            try:
                session = load_session(self._settings)
            except (OSError, ValueError, TypeError) as error:
                _log.error("the device that was kept is of no use without its session: %s", error)
            else:
                _log.info("took over the device from the service manager")
                listener = socket.socket(fileno=passed.pop(BLOCK_NAME))
                return Held(passed.pop(FUSE_NAME), session, listener), None
        self._clean()
        return Held.create(self._settings), None

    def _take_over(self) -> tuple[Held, ProcessId]:
        """Waits for a server that is busy."""
        for _ in range(_TAKE_ATTEMPTS - 1):
            try:
                return take_over(self._settings)
            except Unavailable as error:
                _log.warning("the block server does not answer: %s", error)
        return take_over(self._settings)

    def _lock(self) -> int:
        """The right to be the supervisor of this directory. Raises Busy."""
        fd = os.open(
            self._places.server.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise Busy("another supervisor runs here") from error
        return fd

    def _clean(self) -> None:
        """Removes what dead processes left: a superblock that nobody serves any more, with its
        attachments, and the trees over them. Directories that show them have errors already."""
        server = self._places.server
        trees = self._places.tree("")
        for tree in [*(trees.iterdir() if trees.is_dir() else ()), server.device_dir]:
            with contextlib.suppress(ImgsnapError):
                attach.unmount(tree, lazy=True)
        for path in (server.attachments, trees):
            remove_tree(path)
        users = self._places.users("")
        for path in users.iterdir() if users.is_dir() else ():
            if not path.name.endswith(UBLK):  # disks outlive all of us, with who has them open
                remove_tree(path)

    def run(self) -> int:
        systemd.notify(os.environ, "READY=1")
        gone = self._supervisor.run()
        if self._next == "upgrade":
            self._exec()
        if gone:
            _log.info("the superblock is gone")
        self._supervisor.end_server()
        return 0

    # Calls -----------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answers one caller. Nothing here may take long: nobody else watches the server."""
        with contextlib.suppress(OSError), self._socket.accept()[0] as connection:
            connection.settimeout(_CALLER_S)
            rpc.answer_one(
                connection,
                {
                    "status": self._status,
                    "upgrade": self._upgrade,
                    "stop": self._stop,
                },
            )

    def _status(self, args: dict[str, Any]) -> dict[str, Any]:
        server = self._supervisor.server
        return {
            "pid": os.getpid(),
            "server": server.pid if server else None,
            "starts": self._supervisor.starts,
            "version": __version__,
            "cache": str(self._settings.cache_dir),
            "resends": self._held.session.resends,
        }

    def _upgrade(self, args: dict[str, Any]) -> None:
        """Becomes the program that is installed now, and so does the block server."""
        self._next = "upgrade"
        self._supervisor.stop()

    def _stop(self, args: dict[str, Any]) -> None:
        """Unmounts the superblock and ends; what is mounted from it must be gone before."""
        attach.unmount(self._places.server.device_dir, lazy=bool(args.get("force")))

    def _exec(self) -> None:
        server = self._supervisor.server
        state = {
            "device": self._held.device,
            "listener": self._listener,
            "socket": self._socket.fileno(),
            "lock": self._lock_fd,
            "session": self._held.session._asdict(),
            "server": asdict(server) if server else None,
        }
        for name in ("device", "listener", "socket", "lock"):
            os.set_inheritable(int(str(state[name])), True)
        signal.set_wakeup_fd(-1)
        logging.shutdown()
        os.execve(  # noqa: S606
            sys.executable,
            command(self._places.run_dir, self._settings.cache_dir, self._settings.cache_quota),
            {**os.environ, STATE_VARIABLE: json.dumps(state)},
        )


def command(run_dir: Path, cache_dir: Path, cache_quota: int | None) -> list[str]:
    """The command line of a supervisor."""
    quota = [] if cache_quota is None else [str(cache_quota)]
    program = [sys.executable, "-m", "imgsnap.node.supervise"]
    return [*program, str(run_dir), str(cache_dir), *quota]


def open_source(source: Source) -> Repository:
    return source.open(os.environ)


def preload() -> None:
    """Imports what a block server needs."""
    for name in _PRELOADED:
        importlib.import_module(name)


def run_supervisor(run_dir: Path, cache_dir: Path, cache_quota: int | None) -> int:
    """The process's whole life; 0 at the end of the superblock.

    Raises Busy when another one runs, Unavailable for a block server that does not answer,
    Unsupported, AccessDenied, OSError.
    """
    preload()
    places = NodePlaces(run_dir)
    linux.name_process("imgsnap-super")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.chdir("/")
    places.server.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    start_log(places.server.log)
    linux.raise_descriptor_limit()
    supervisor = NodeSupervisor(places, cache_dir, cache_quota)
    try:
        supervisor.start()
    except (ImgsnapError, OSError) as error:
        _log.error("cannot start: %s", error)
        raise
    return supervisor.run()


def main(arguments: list[str]) -> int:
    """`check` only imports what a supervisor needs."""
    if arguments == ["check"]:
        preload()
        return 0
    run_dir, cache_dir = map(Path, arguments[:2])
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # who started us may have blocked some
    try:
        return run_supervisor(run_dir, cache_dir, int(arguments[2]) if arguments[2:] else None)
    except (ImgsnapError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
