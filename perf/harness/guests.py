"""Guests of `imgsnap vm run` that stay: started some at a time, alive together, ended at once."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.processes import child_environment, end, output_of, proportional_memory
from harness.report import tell

KIT = ROOT / ".guest-kit"
"""QEMU and a guest's kernel, by scripts/guest-kit."""
STARTING = 2
"""At a time: emulated boots take a processor each."""
TRIES = 3
"""Of a guest that its emulator fails."""
UP = "guest is up"
STAY = f"grep -E '^(MemFree|Cached):' /proc/meminfo; echo {UP}; exec sleep 100000"
"""What a guest's shell does when its work is done."""
_MEMINFO = re.compile(r"^(MemFree|Cached): +(\d+) kB", re.MULTILINE)


def prepare_kit() -> None:
    """Sees to it that the kit is there, and its QEMU the first that is found."""
    output_of([str(ROOT / "scripts/guest-kit"), str(KIT)])
    os.environ["PATH"] = f"{KIT}:{os.environ['PATH']}"


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest whose work is done, and the processes behind it."""

    process: "subprocess.Popen[str]"
    meminfo: dict[str, int]  # bytes, after the work

    @property
    def ours(self) -> int:
        """Bytes of `imgsnap vm run` (Pss)."""
        return proportional_memory(self.process.pid)

    @property
    def qemu(self) -> int:
        """Bytes of its QEMU (Pss)."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return sum(proportional_memory(int(pid)) for pid in children.split())


class Guests:
    """Use it as a context manager: leaving ends them all."""

    def __init__(self, command: Sequence[str | Path], work: Path) -> None:
        self._command = command
        self._work = work
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Guests":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            end(process)

    def start(self, count: int) -> list[Guest]:
        """More guests, when all of them have done their work. Raises SystemExit."""
        up: list[Guest] = []
        waiting: list[tuple[int, int, subprocess.Popen[str]]] = []
        numbers = list(range(len(self._started), len(self._started) + count))
        while numbers or waiting:
            while numbers and len(waiting) < STARTING:
                number = numbers.pop(0)
                waiting.append((number, 1, self._one(number)))
            time.sleep(0.1)
            for item in list(waiting):
                number, attempt, process = item
                said = self._output(number).read_text(errors="replace")
                if UP in said:
                    waiting.remove(item)
                    up.append(Guest(process, _meminfo(said)))
                    tell(f"guests: {len(up)} of {count} are up")
                elif process.poll() is not None:
                    waiting.remove(item)
                    self._started.remove(process)
                    if attempt == TRIES:
                        raise SystemExit(f"error: a guest ended: {said[-2000:]}")
                    tell(f"guests: one ended and is started again: {said[-300:]}")
                    waiting.append((number, attempt + 1, self._one(number)))
        return up

    def _one(self, number: int) -> "subprocess.Popen[str]":
        with self._output(number).open("w") as output:
            process = subprocess.Popen(
                [str(word) for word in self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
                env=child_environment(),
            )
        self._started.append(process)
        return process

    def _output(self, number: int) -> Path:
        return self._work / f"guest-{number}.log"


def _meminfo(said: str) -> dict[str, int]:
    return {name: int(kib) << 10 for name, kib in _MEMINFO.findall(said)}
