"""`imgsnap snapshotter run` as it is installed: a process of its own with a node daemon beneath."""

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imgsnap.mount import linux
from imgsnap.snapshotter.ledger import Ledger
from tests.support.cli import Cli
from tests.support.containerd import Containerd
from tests.support.docker_registry import DockerRegistry
from tests.support.node import Node, wait_for

NAME, HTTP, BUSYBOX = "imgsnap", "--plain-http", "/bin/busybox"


@dataclass
class Ours:
    """The snapshotter's process; its node daemon is `node`."""

    cli: Cli
    work: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen | None = None

    @property
    def socket(self) -> Path:
        return self.work / "s.sock"

    @property
    def node(self) -> Node:
        return Node(self.cli)

    def start(self) -> None:
        where = ("--root", self.work / "state", "--address", self.socket)
        command = (sys.executable, "-m", "imgsnap_cli", "-v", "snapshotter", "run", *where, HTTP)
        with (self.work / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*map(str, command), *self.options],
                env=self.cli.environment({"PYTHONFAULTHANDLER": "1"}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(self.socket.exists, "the snapshotter's socket")

    def _await_end(self, process: subprocess.Popen) -> None:
        """One that does not end says where each of its threads is, and dies."""
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            process.wait()
            print((self.work / "log").read_text(), file=sys.stderr)
            raise

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.cli.forget_killed(self.process.pid)
        self.socket.unlink(missing_ok=True)

    def states(self) -> list[str]:
        with contextlib.closing(Ledger.read(self.work / "state")) as ledger:
            return [str(row.state) for row in ledger.scan()]

    def shown(self) -> list[str]:
        devices = self.work / "state" / "devices"
        return [path.name for path in devices.iterdir()] if devices.is_dir() else []

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self._await_end(self.process)
        for path in (self.work / "state" / "devices").glob("*/fs"):
            self.cli.any("umount", "--lazy", path)
        self.cli.any("daemon", "stop", "--force")


@contextlib.contextmanager
def ours(cli: Cli, *options: str) -> Iterator[Ours]:
    with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work:
        running = Ours(cli, Path(work), options)
        try:
            running.start()
            yield running
        except BaseException:
            print((running.work / "log").read_text(), file=sys.stderr)
            raise
        finally:
            running.end()


def run(containerd: Containerd, reference: str, command: str, namespace: str = "k8s.io") -> str:
    """What a shell command prints; ctr sometimes copies nothing, so the end is marked."""
    for _ in range(5):
        marked = f"{command}; echo -n .end."
        arguments = (reference, BUSYBOX, "sh", "-c", marked)
        out = containerd.run(*arguments, snapshotter=NAME, namespace=namespace)
        if out.endswith(".end."):
            return out.removesuffix(".end.")
    raise AssertionError(f"no whole output of {command!r}: {out!r}")


def pull(
    cli: Cli,
    containerd: Containerd,
    registry: DockerRegistry,
    reference: str,
    namespace: str = "k8s.io",
) -> None:
    containerd.allow_http(registry.address)
    address = ("--address", containerd.socket, "--namespace", namespace)
    cli("pull", "--containerd", HTTP, *address, reference)


def reached(containerd: Containerd) -> bool:
    """Whether containerd has connected to the snapshotter again, which takes up to 3 seconds."""
    with contextlib.suppress(AssertionError):
        containerd.snapshots(NAME, namespace="k8s.io")
        return True
    return False


def shown_from(it: Ours) -> Path:
    """The source that mountinfo has for the directory that a container's overlay lies on."""
    (target,) = it.work.glob("state/devices/*/fs")
    return Path([point.source for point in linux.mount_points() if point.target == target][-1])
