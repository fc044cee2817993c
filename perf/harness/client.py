"""imgsnap as its users start it: the command line, with directories of its own."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.processes import Usage, measured, output_of


@dataclass(frozen=True, slots=True)
class Client:
    """A store, a cache and a run directory below one temporary directory."""

    root: Path

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def run_dir(self) -> Path:
        return self.root / "run"

    def command(self, *arguments: str | Path) -> list[str | Path]:
        return [
            sys.executable,
            "-m",
            "imgsnap_cli",
            "--store",
            self.store,
            "--cache-dir",
            self.cache,
            "--run-dir",
            self.run_dir,
            *arguments,
        ]

    def run(self, *arguments: str | Path) -> Usage:
        return measured(self.command(*arguments))

    def convert(
        self, source: str, target: str, *options: str | Path
    ) -> tuple[Usage, dict[str, Any]]:
        """What the process cost, and its own report."""
        report = self.root / "report.json"
        usage = self.run(
            "convert", source, target, "--progress", "none", "--report", report, *options
        )
        return usage, json.loads(report.read_text())

    def mount(self, reference: str, target: Path, *options: str) -> Usage:
        return self.run("mount", reference, target, *options)

    def umount(self, target: Path) -> None:
        output_of(self.command("umount", target))

    @contextlib.contextmanager
    def mounted(self, reference: str, target: Path, *options: str) -> Iterator[Usage]:
        """Unmounts also on errors."""
        usage = self.mount(reference, target, *options)
        try:
            yield usage
        finally:
            self.umount(target)

    def server_pid(self, target: Path) -> int:
        """The block server of a mount: the child of the supervisor that its record names."""
        listing = json.loads(output_of(self.command("mounts", "--format", "json")))
        wanted = str(target.resolve())
        pid = next(int(item["pid"]) for item in listing["mounts"] if item["target"] == wanted)
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def forget_data(self) -> None:
        """Empties the node cache."""
        shutil.rmtree(self.cache, ignore_errors=True)

    def end(self) -> None:
        """Unmounts whatever an error left mounted."""
        if (self.run_dir / "mounts").is_dir() and any((self.run_dir / "mounts").glob("*.json")):
            measured(self.command("umount", "--all", "--lazy"))


def blob_bytes(layout: Path) -> int:
    """Bytes of all blobs of an image layout: what a registry would hold."""
    return sum(path.stat().st_size for path in (layout / "blobs").rglob("*") if path.is_file())


def tree_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
