"""Samples in interleaved rounds, figures beside what they are measured against, the JSON file."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT

Sample = Mapping[str, Any]
_SUFFIXES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value and the limit or rival it stands beside, in the same unit."""

    label: str
    ours: float
    unit: str  # "s", "us", "B", "B/s", or "" for counts
    against: str
    other: float | None
    aim: float | None = None  # the ratio aimed at, when it is not 1

    @property
    def ratio(self) -> float | None:
        return self.ours / self.other if self.other else None


@dataclass
class Report:
    """Everything a benchmark found out; printed as a table and written as JSON."""

    name: str
    arguments: dict[str, Any]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: machine())

    def interleave(self, runs: int, steps: Mapping[str, Callable[[], Sample]]) -> None:
        """Takes a sample of each step in turn, `runs` times: A B C A B C …"""
        for number in range(runs):
            for label, step in steps.items():
                tell(f"{self.name}: {label} ({number + 1}/{runs})")
                self.samples.setdefault(label, []).append(step())

    def median(self, label: str, key: str) -> float:
        return statistics.median(float(sample[key]) for sample in self.samples[label])

    def figure(
        self,
        label: str,
        ours: float,
        unit: str,
        against: str,
        other: float | None,
        aim: float | None = None,
    ) -> None:
        """Adds a row: ours, the other value, their ratio."""
        self.figures.append(Figure(label, ours, unit, against, other, aim))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        """Prints the table and writes perf/results/<name>.json."""
        print("\n".join(self._table()))
        for text in self.notes:
            print(f"  note: {text}")
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        value = {
            "name": self.name,
            "arguments": self.arguments,
            "machine": self.machine,
            "figures": [asdict(item) | {"ratio": item.ratio} for item in self.figures],
            "notes": self.notes,
            "samples": self.samples,
        }
        path.write_text(json.dumps(value, indent=1, default=str) + "\n")
        tell(f"{self.name}: all samples are in {path}")

    def _table(self) -> list[str]:
        rows = [("FIGURE", "IMGSNAP", "RATIO", "AIM", "OTHER", "WHICH IS")]
        for item in self.figures:
            other = "" if item.other is None else shown(item.other, item.unit)
            ratio = "" if item.ratio is None else f"{item.ratio:.2f}x"
            aim = "" if item.aim is None else f"{item.aim:.2f}x"
            ours = shown(item.ours, item.unit)
            rows.append((item.label, ours, ratio, aim, other, item.against))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        right = (False, True, True, True, True, False)
        return [
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ).rstrip()
            for row in rows
        ]


def shown(value: float, unit: str) -> str:
    """For people: 12 ms, 3.4 s, 5.6 MiB, 7."""
    if unit == "s":
        return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
    if unit == "B":
        for suffix, factor in reversed(_SUFFIXES.items()):
            if value >= factor:
                return f"{value / factor:.1f} {suffix}"
        return f"{value:.0f} B"
    if unit == "B/s":
        return f"{value / (1 << 20):.0f} MiB/s"
    if unit == "us":
        return f"{value:.1f} us"
    return f"{value:.10g}" if value == int(value) else f"{value:.1f}"


def tell(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """Where and with what; the load tells whether the machine was quiet."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "revision": _first_line(["git", "-C", str(ROOT), "describe", "--always", "--dirty"]),
        "cpu": models[0] if models else platform.processor(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg(),
        "mksquashfs": _first_line(["mksquashfs", "-version"]),
        "containerd": _first_line(["containerd", "--version"]),
        "docker-registry": _first_line(["docker-registry", "--version"]),
        "fio": _first_line(["fio", "--version"]),
    }


def _first_line(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return "absent"
    return (result.stdout or result.stderr).partition("\n")[0]
