"""Our snapshotter as a process of its own, to be asked, killed and started again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.rows import Row
from tests.support.cli import REPOSITORY

_START_S = 60.0


@dataclass
class Snapshotter:
    """`imgsnap snapshotter run` with everything below `work`."""

    work: Path
    process: subprocess.Popen[bytes] | None = None
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        return self.work / "snapshotter"

    @property
    def socket(self) -> Path:
        return self.work / "s.sock"

    @property
    def log(self) -> str:
        return (self.work / "snapshotter.log").read_text(errors="replace")

    def start(self) -> None:
        self.work.mkdir(exist_ok=True)
        self.socket.unlink(missing_ok=True)
        arguments = ["--root", str(self.root), "--address", str(self.socket)]
        command = [sys.executable, "-m", "imgsnap_cli", "-v", "snapshotter", "run", *arguments]
        path = f"{REPOSITORY}:{REPOSITORY / 'cli'}"
        with (self.work / "snapshotter.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, **self._places(), **self.environ},
            )
        deadline = time.monotonic() + _START_S
        while not self.socket.exists():
            assert self.process.poll() is None, f"the snapshotter ended:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, "the snapshotter does not start"
            time.sleep(0.005)

    def _places(self) -> dict[str, str]:
        names = ("RUN", "CACHE")
        return {f"IMGSNAP_{name}_DIR": str(self.work / name.lower()) for name in names} | {
            "IMGSNAP_STORE": str(self.work / "store")
        }

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        if self.process is None:
            return 0
        self.process.send_signal(how)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process = None

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def rows(self) -> list[Row]:
        """Read beside the running process, as the command line does."""
        with contextlib.closing(Ledger.read(self.root)) as ledger:
            return ledger.scan()

    def files(self) -> list[str]:
        """What is in its directories of snapshots."""
        found = [path for name in ("snapshots", "removed") for path in (self.root / name).iterdir()]
        return sorted(str(path.relative_to(self.root)) for path in found)


@contextlib.contextmanager
def running_snapshotter(work: Path) -> Iterator[Snapshotter]:
    snapshotter = Snapshotter(work)
    try:
        snapshotter.start()
        yield snapshotter
    finally:
        if snapshotter.process is not None:
            snapshotter.kill()
