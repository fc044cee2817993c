"""The command line in a subprocess, with places of its own and an account of what it left."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 120


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        value = json.loads(self.out)
        assert value["schema"] == 1
        return value


@dataclass
class Cli:
    """Runs `imgsnap` with directories below `root`, which nothing else uses."""

    root: Path

    def __post_init__(self) -> None:
        for name in ("store", "cache", "run", "tmp", "home"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def environment(self, changes: Mapping[str, str] | None = None) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'cli'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.tmp),
            "IMGSNAP_STORE": str(self.store),
            "IMGSNAP_CACHE_DIR": str(self.cache),
            "IMGSNAP_RUN_DIR": str(self.run_dir),
            **(changes or {}),
        }

    def start(self, *arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """The command running in its own process group."""
        return subprocess.Popen(
            [sys.executable, "-m", "imgsnap_cli", *map(str, arguments)],
            env=self.environment(env),
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )

    def any(self, *arguments: object, env: Mapping[str, str] | None = None) -> Result:
        """Runs to the end, whatever the exit code."""
        process = self.start(*arguments, env=env)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        return Result(
            process.returncode,
            out.decode("utf-8", "surrogateescape"),
            err.decode("utf-8", "surrogateescape"),
        )

    def __call__(self, *arguments: object, env: Mapping[str, str] | None = None) -> Result:
        """Runs a command that must succeed."""
        result = self.any(*arguments, env=env)
        assert result.code == 0, result.err
        return result

    def fails(
        self, code: int, *arguments: object, env: Mapping[str, str] | None = None, hint: bool = True
    ) -> str:
        """Runs a command that must fail as documented; returns what it wrote about it."""
        result = self.any(*arguments, env=env)
        refused(result, code, hint=hint)
        return result.err

    def convert(self, source: object, target: object, *options: object) -> str:
        """The snapshot's digest."""
        result = self("convert", source, target, "--progress", "none", *options)
        return result.out.strip().splitlines()[-1].partition("sha256:")[2][:64]

    def bytes_of(self, *arguments: object) -> bytes:
        """Standard output as it is."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, err.decode()
        return out

    def report(self, source: object, target: object, *options: object) -> Any:
        """The report of a conversion."""
        path = self.root / "report.json"
        self("convert", source, target, "--progress", "none", "--report", path, *options)
        return json.loads(path.read_text())

    # What is left ----------------------------------------------------------------------------

    def mounts(self) -> list[str]:
        """Mount points below `root`."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [p for line in lines if (p := line.split()[4]).startswith(str(self.root))]

    def processes(self) -> list[int]:
        """Processes with our store in their environment."""
        mark = f"IMGSNAP_STORE={self.store}\0".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark in (entry / "environ").read_bytes() + b"\0":
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def forget_killed(self, pid: int) -> None:
        """Takes away the file that a process was writing when a test killed it, as age would."""
        for path in self.cache.glob(f"*/tmp/{pid}.*"):
            path.unlink(missing_ok=True)

    def leftovers(self) -> list[str]:
        """Everything that commands and mounts should have taken away again."""
        run = self.run_dir
        files = [p for name in ("mounts", "dev", "lower", "log") for p in (run / name).glob("*")]
        files += [*run.glob("run-*"), *(self.cache / "rw").glob("*"), *self.tmp.iterdir()]
        files += self.cache.glob("*/tmp/*")
        return [
            *(f"mount {mount}" for mount in self.mounts()),
            *(f"process {pid}" for pid in self.processes()),
            *(f"file {path}" for path in files),
            *(f"loop {name}" for name in self._loops()),
        ]

    def _loops(self) -> list[str]:
        found = []
        for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
            try:
                if backing.read_text().startswith(str(self.root)):
                    found.append(backing.parts[3])
            except OSError:
                continue
        return found


def refused(result: Result, code: int, *, hint: bool = True) -> None:
    """One error line, a hint where one is due, the documented code, and no traceback."""
    lines = result.err.strip().splitlines()
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err, result.err
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(hints) <= 1 and (hints or not hint), result.err
