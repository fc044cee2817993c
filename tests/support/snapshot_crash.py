"""Kills a snapshotter at each of its steps: ``python -m tests.support.snapshot_crash ROOT``.

For n = 0, 1, … a forked child does a series of calls in ROOT/n and kills itself before its n-th
change of a file system or statement to the ledger. Then the root is opened again: what was
acknowledged must be there, the call under way wholly or not at all, nothing else; and the rest of
the series must lead to the same end as without a kill. Prints how many steps there were.
"""

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from imgsnap.errors import AlreadyExists, NotFound
from imgsnap.snapshotter import snapshots as snapshots_module
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.report import check_root
from imgsnap.snapshotter.serve import Parts, opened
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support.remote_parts import (
    DirectoryDevices,
    Images,
    OneFileLayers,
    image_of,
    labels_of,
    layer_file,
)

APP = image_of("base", "app")
STEPS = ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "chown")

Rows = dict[str, tuple[str, str]]
"""Name to state and parent."""

LOWER = f"imgsnap/{APP.layers[0].chain_id}"
Call = tuple[str, tuple[Any, ...]]
SERIES: list[Call] = [
    ("prepare", ("extract", "", {})),
    ("write", ("extract", "layer")),
    ("commit", ("layer", "extract", {"kept": "yes"})),
    ("prepare", ("container", "layer", {})),
    ("view", ("view", "layer", {})),
    ("remove", ("view",)),
    ("claim", ("x", "", labels_of(APP, 0))),
    ("claim", ("y", LOWER, labels_of(APP, 1))),
    ("prepare", ("other", LOWER, {})),  # materialises
    ("cleanup", ()),
    ("remove", ("container",)),
    ("remove_claimed", (1,)),
    ("cleanup", ()),
    ("remove", ("other",)),
    ("remove_claimed", (0,)),
    ("cleanup", ()),
]


class _Now:
    """Background work at once, so that every run has the same steps."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def submit(self, function: Callable[..., object], *arguments: object) -> None:
        function(*arguments)

    def shutdown(self, **_: object) -> None: ...


@contextmanager
def snapshotter(root: Path):
    parts = Parts(Images([APP]), DirectoryDevices(root / "devices"), OneFileLayers())
    with opened(root, parts) as running:
        yield running


def do(snapshots: Snapshots, root: Path, call: Call) -> None:
    name, arguments = call
    if name == "write":
        key, text = arguments
        row = snapshots.stat(key)
        (root / f"snapshots/{row.id}/fs/file").write_text(text)
    elif name == "claim":
        try:
            snapshots.prepare(*arguments)
        except AlreadyExists:
            return
        raise AssertionError("not claimed")
    elif name == "remove_claimed":
        target = APP.layers[arguments[0]].chain_id
        snapshots.remove(next(r.name for r in snapshots.list(()) if r.target == target))
    else:
        getattr(snapshots, name)(*arguments)


def rows_of(snapshots: Snapshots) -> Rows:
    return {row.name: (row.state, row.parent) for row in snapshots.list(())}


def expected(root: Path) -> list[tuple[Rows, dict[str, str]]]:
    """The rows before the series and after each of its calls."""
    found: list[Rows] = []
    with snapshotter(root) as snapshots:
        found.append(rows_of(snapshots))
        for call in SERIES:
            do(snapshots, root, call)
            found.append(rows_of(snapshots))
    return found


def arm(number: int) -> None:
    """Makes this process kill itself before its step `number`."""
    left = number

    def step() -> None:
        nonlocal left
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            step()
            return function(*arguments, **options)

        return wrapped

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))

    class Counted(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            if not str(arguments[0]).startswith("select"):
                step()
            return super().execute(*arguments)

    connect = sqlite3.connect
    sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Counted)  # type: ignore[assignment]


def child(root: Path, number: int) -> None:
    arm(number)
    acknowledged = os.open(root / "acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with snapshotter(root / "root") as snapshots:
        for call in SERIES:
            do(snapshots, root / "root", call)
            os.write(acknowledged, b".")


def judge(place: Path, states: list[Rows]) -> None:
    """After a kill: see the module."""
    root = place / "root"
    done = len((place / "acknowledged").read_bytes()) if (place / "acknowledged").exists() else 0
    with snapshotter(root) as snapshots:
        now = rows_of(snapshots)
        under_way = states[done + 1 : done + 2]
        before_or_after = [rows_without_promise(s) for s in (states[done], *under_way)]
        assert rows_without_promise(now) in before_or_after, (done, now, before_or_after)
        report = check_root(root)
        assert report.problems == (), (done, report)
        for row in snapshots.list(()):
            check_content(root, row, done)
        for call in SERIES[done:]:
            with suppress(AlreadyExists, NotFound, StopIteration):  # it was done before the kill
                do(snapshots, root, call)
        assert rows_of(snapshots) == states[-1], (done, rows_of(snapshots))
        assert left(root) == [], left(root)


def rows_without_promise(rows: Rows) -> Rows:
    """Materialising is durable before the Prepare that wants it."""
    return {n: ("layer" if s == "placeholder" else s, parent) for n, (s, parent) in rows.items()}


def check_content(root: Path, row: Any, done: int) -> None:
    tree = root / f"snapshots/{row.id}/fs"
    if row.name == "layer":
        assert (tree / "file").read_text() == "layer"
        assert dict(row.labels) == {"kept": "yes"}
    if row.claim and row.claim.materialised:
        assert [path.name for path in tree.iterdir()] == [layer_file(row.claim.layer)]


def left(root: Path) -> list[str]:
    """Files that should not be there when only `layer` is left."""
    with closing(Ledger.read(root)) as ledger:
        wanted = {f"snapshots/{row.id}" for row in ledger.scan()}
    places = ("snapshots", "removed", "devices")
    found = {f"{p}/{c.name}" for p in places if (root / p).exists() for c in (root / p).iterdir()}
    return sorted(found ^ wanted)


def main(root: Path) -> int:
    snapshots_module.ThreadPoolExecutor = _Now  # type: ignore[misc,assignment]
    states = expected(root / "model")
    for number in count():
        place = root / str(number)
        place.mkdir()
        pid = os.fork()
        if not pid:
            try:
                child(place, number)
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return number
        judge(place, states)
    raise AssertionError


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
