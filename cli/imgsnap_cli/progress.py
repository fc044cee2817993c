"""Progress on standard error: a bar per layer on a terminal, a line per event elsewhere."""

import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TextIO

import click

from imgsnap.convert.progress import Progress, Silent
from imgsnap.units import format_size

progress_option = click.option(
    "--progress",
    type=click.Choice(["auto", "tty", "plain", "none"]),
    default="auto",
    show_default=True,
    help="auto: tty on a terminal, else plain",
)

REFRESH_S = 0.1
BAR_CELLS = 24


def make_progress(mode: str, stream: TextIO | None = None) -> Progress:
    """The renderer for a --progress value."""
    out = stream or sys.stderr
    if mode == "auto":
        mode = "tty" if out.isatty() else "plain"
    if mode == "none":
        return Silent()
    return Bars(out) if mode == "tty" else Plain(out)


class Plain:
    """One line when a layer enters a stage and one when it is complete."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()

    def stage(self, layer: str, stage: str, total: int) -> None:
        self._line(f"{layer} {stage} {format_size(total)}")

    def advance(self, layer: str, count: int) -> None:
        """Nothing: plain output is for logs."""

    def done(self, layer: str, note: str) -> None:
        self._line(f"{layer} done ({note})")

    def _line(self, text: str) -> None:
        with self._lock:
            click.echo(text, file=self._out)


@dataclass(slots=True)
class _Layer:
    stage: str = "wait"
    total: int = 0
    count: int = 0
    note: str = ""


@dataclass(slots=True)
class _Screen:
    layers: dict[str, _Layer] = field(default_factory=dict)
    lines: int = 0
    drawn: float = 0.0


class Bars:
    """Redraws one line per layer in place."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._screen = _Screen()

    def stage(self, layer: str, stage: str, total: int) -> None:
        with self._lock:
            self._screen.layers[layer] = _Layer(stage, total)
            self._draw(force=True)

    def advance(self, layer: str, count: int) -> None:
        with self._lock:
            state = self._screen.layers.setdefault(layer, _Layer())
            state.count += count
            self._draw()

    def done(self, layer: str, note: str) -> None:
        with self._lock:
            self._screen.layers[layer] = _Layer("done", note=note)
            self._draw(force=True)

    def _draw(self, *, force: bool = False) -> None:
        now = time.monotonic()
        screen = self._screen
        if not force and now - screen.drawn < REFRESH_S:
            return
        screen.drawn = now
        columns, rows = shutil.get_terminal_size()
        shown = list(screen.layers.items())[-(rows - 2) :]
        text = f"\x1b[{screen.lines}F" if screen.lines else ""
        text += "".join(f"{_bar(*item)[: columns - 1]}\x1b[K\n" for item in shown)
        screen.lines = len(shown)
        self._out.write(text)
        self._out.flush()


def _bar(label: str, layer: _Layer) -> str:
    if layer.stage == "done":
        return f"{label}  done    {layer.note}"
    share = min(layer.count / layer.total, 1.0) if layer.total else 1.0
    cells = int(share * BAR_CELLS)
    bar = "#" * cells + "." * (BAR_CELLS - cells)
    sizes = f"{format_size(layer.count)} / {format_size(layer.total)}"
    return f"{label}  {layer.stage:<7} [{bar}] {sizes}"
