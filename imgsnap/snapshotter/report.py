"""What an operator asks, read beside a running snapshotter."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from imgsnap.snapshotter.directories import REMOVED, SNAPSHOTS, measure
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.rows import Row, Usage

_SECOND_LOOK_S = 0.5
"""A row and its directory come and go one after the other; what lasts longer is a problem."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `check_root` found."""

    rows: int
    problems: tuple[str, ...]


def check_root(root: Path) -> Report:
    """Compares ledger and directories. Raises NotFound, and IntegrityError for damaged rows."""
    rows, problems = _look(root)
    if problems:
        time.sleep(_SECOND_LOOK_S)
        rows, again = _look(root)
        problems = [problem for problem in again if problem in problems]
    return Report(rows, tuple(problems))


def _look(root: Path) -> tuple[int, list[str]]:
    with closing(Ledger.read(root)) as ledger:
        rows = ledger.scan()
        present = {path.name for path in (root / SNAPSHOTS).iterdir()}
        problems = _orphans(rows)
        problems += [
            f"{row.name}: its directory snapshots/{row.id} is missing"
            for row in rows
            if row.has_directory and str(row.id) not in present
        ]
        wanted = {str(row.id) for row in rows if row.has_directory}
        problems += [f"snapshots/{name} is of no snapshot" for name in sorted(present - wanted)]
    return len(rows), problems


def _orphans(rows: list[Row]) -> list[str]:
    names = {row.name for row in rows}
    return [
        f"{row.name}: its parent {row.parent} is missing"
        for row in rows
        if row.parent and row.parent not in names
    ]


def usage_by_state(root: Path) -> dict[str, tuple[int, Usage]]:
    """For each state how many rows there are and what they take; "removed" awaits Cleanup.

    Raises NotFound.
    """
    with closing(Ledger.read(root)) as ledger:
        rows = ledger.scan()
    found: dict[str, tuple[int, Usage]] = {}
    for row in rows:
        _add(found, row.state, root / SNAPSHOTS / str(row.id) if row.has_directory else None)
    for path in (root / REMOVED).iterdir():
        _add(found, "removed", path)
    return found


def _add(found: dict[str, tuple[int, Usage]], state: str, directory: Path | None) -> None:
    count, total = found.get(state, (0, Usage(0, 0)))
    use = Usage(0, 0)
    if directory is not None:
        try:
            use = measure(directory)
        except FileNotFoundError:  # removed meanwhile
            return
    found[state] = count + 1, Usage(total.size + use.size, total.inodes + use.inodes)
