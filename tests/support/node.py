"""A node daemon in a test: started, killed piece by piece, and gone at the end."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from imgsnap.errors import Unavailable
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc
from imgsnap.node.places import NodePlaces
from tests.support.cli import Cli

WAIT_S = 20.0


def wait_for(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = true()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {WAIT_S} s")


@dataclass
class Node:
    """The daemon of a `Cli`'s directories."""

    cli: Cli
    control: subprocess.Popen | None = None

    @property
    def places(self) -> NodePlaces:
        return NodePlaces(self.cli.run_dir)

    def start(self, env: Mapping[str, str] | None = None) -> None:
        self.control = self.cli.start("daemon", "run", env=env)
        wait_for(self.status, "the control process")
        wait_for(self.supervisor, "a supervisor")

    def status(self) -> dict[str, Any] | None:
        try:
            return rpc.call(self.places.control_socket, "status", timeout_s=5)
        except Unavailable:
            return None

    def _pid(self, path, field="pid") -> ProcessId | None:
        try:
            return ProcessId.of(rpc.call(path, "status", timeout_s=5)[field])
        except (Unavailable, ProcessLookupError, TypeError):
            return None

    def supervisor(self) -> ProcessId | None:
        return self._pid(self.places.server.supervisor_socket)

    def server(self) -> ProcessId | None:
        return self._pid(self.places.server.block_socket)

    def kill_control(self) -> None:
        assert self.control is not None
        self.control.kill()
        self.control.communicate()
        self.cli.forget_killed(self.control.pid)
        self.control = None

    def kill(self, process: ProcessId) -> None:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(5)
        self.cli.forget_killed(process.pid)

    def attachments(self) -> list[dict[str, Any]]:
        return rpc.call(self.places.control_socket, "attachments")

    def close(self) -> None:
        """Ends everything, also after a failure."""
        self.cli.any("daemon", "stop", "--force")
        for find in (self.supervisor, self.server):
            process = find()
            if process is not None:
                process.end(5)
        if self.control is not None:
            self.control.kill()
            self.control.communicate()


@contextmanager
def node_daemon(cli: Cli, env: Mapping[str, str] | None = None) -> Iterator[Node]:
    node = Node(cli)
    try:
        node.start(env)
        yield node
    finally:
        node.close()
