"""Results on standard output: tables for people, JSON for programs."""

import json
from collections.abc import Sequence
from typing import Any

import click

SCHEMA = 1
"""Of every JSON document printed; raised when a field changes its meaning or goes."""

format_option = click.option(
    "--format",
    "format_",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Form of the output",
)


def print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema": SCHEMA, **value}, indent=2, ensure_ascii=False))


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Columns two spaces apart; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in [list(headers), *cells]) for n in range(len(headers))]
    right = [
        bool(rows) and all(isinstance(row[n], int) for row in rows) for n in range(len(headers))
    ]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return [line(headers), *(line(row) for row in cells)]


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    for line in table_lines(headers, rows):
        click.echo(line)


def printable(path: bytes) -> str:
    """A path from an image for a terminal: other bytes than printable text are escaped."""
    text = path.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
