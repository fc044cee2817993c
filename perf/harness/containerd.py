"""A private containerd: own root, state and socket, nothing shared with one of the machine's."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.options import skip
from harness.processes import Usage, child_environment, measured, running

START_S = 30.0


@dataclass(frozen=True, slots=True)
class Containerd:
    """Pulls and runs through `ctr`."""

    socket: Path
    pid: int

    def command(self, *arguments: str) -> list[str]:
        return ["ctr", "--address", str(self.socket), *arguments]

    def answers(self) -> bool:
        version = self.command("version")
        return subprocess.run(version, capture_output=True, check=False).returncode == 0

    def pull(self, reference: str) -> Usage:
        return measured(self.command("images", "pull", "--plain-http", reference))

    def run_command(self, reference: str, container: str) -> list[str]:
        """The command that runs the image's own command in the host's network."""
        return self.command("run", "--rm", "--net-host", reference, container)

    def forget(self, reference: str) -> None:
        """Removes an image, its snapshots and its blobs; returns when they are gone."""
        self._quietly("images", "rm", "--sync", reference)

    def remove_container(self, container: str) -> None:
        """What a task that was killed leaves behind."""
        self._quietly("tasks", "kill", "--signal", "SIGKILL", container)
        self._quietly("tasks", "delete", "--force", container)
        self._quietly("containers", "delete", container)

    def _quietly(self, *arguments: str) -> None:
        subprocess.run(
            self.command(*arguments), env=child_environment(), capture_output=True, check=False
        )


@contextlib.contextmanager
def containerd(work: Path) -> Iterator[Containerd]:
    """Keeps all below `work`; ends by process id."""
    if shutil.which("containerd") is None or shutil.which("ctr") is None:
        raise skip("containerd is not installed")
    work.mkdir()
    socket, config, log = work / "socket", work / "config.toml", work / "log"
    config.write_text(
        f'version = 2\nroot = "{work}/root"\nstate = "{work}/state"\n'
        'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{socket}"\n[ttrpc]\n  address = "{socket}.ttrpc"\n'
    )
    command = ["containerd", "--config", str(config), "--log-level", "warn"]
    with (
        log.open("wb") as out,
        running(command, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        server = Containerd(socket, process.pid)
        deadline = time.monotonic() + START_S
        while subprocess.run(
            server.command("version"), capture_output=True, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: containerd: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        yield server
