"""The options that all benchmarks have, and the directory each works in."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import NoReturn

CORPUS = Path("/var/tmp/imgsnap-corpus")
SKIPPED = 77
"""Exit code of a benchmark whose needs are not met, as automake's tests have it."""


def parser(description: str | None, *, runs: int) -> argparse.ArgumentParser:
    """With --runs, --corpus, --tools and --work."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--runs", type=int, default=runs, help=f"rounds of samples [{runs}]")
    found.add_argument(
        "--corpus", type=Path, default=CORPUS, help=f"OCI layouts, one directory each [{CORPUS}]"
    )
    found.add_argument(
        "--tools",
        type=Path,
        default=os.environ.get("IMGSNAP_CORPUS_TOOLS"),
        help="directory with shaped-registry and start-image [IMGSNAP_CORPUS_TOOLS]",
    )
    found.add_argument("--work", type=Path, help="for temporary files [TMPDIR, /var/tmp]")
    return found


@contextlib.contextmanager
def work_directory(arguments: argparse.Namespace) -> Iterator[Path]:
    """A new directory, removed with all in it; on a disk, where users have their stores.

    From here on SIGTERM unwinds the stack, as Ctrl-C does.
    """
    signal.signal(signal.SIGTERM, _terminate)
    parent = arguments.work or Path(os.environ.get("TMPDIR", "/var/tmp"))
    path = Path(mkdtemp(prefix="imgsnap-perf-", dir=parent))
    try:
        yield path
    finally:
        left = _mounted_below(path)
        if left:
            print(f"still mounted, so not removed: {', '.join(left)}", file=sys.stderr)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _mounted_below(path: Path) -> list[str]:
    """Mounts that an error left: nothing is removed through them."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{path}/")]


def skip(reason: str) -> SystemExit:
    print(f"skipped: {reason}")
    return SystemExit(SKIPPED)
