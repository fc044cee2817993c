"""Runs the benchmarks, or those named, with small defaults; options after -- go to all of them.

python perf/run.py                          every one, 3 rounds
python perf/run.py convert mount --runs 7
python perf/run.py start -- --images nginx node
"""

import argparse
import subprocess
import sys
from pathlib import Path

from harness.options import SKIPPED

HERE = Path(__file__).resolve().parent
NAMES = ("convert", "store", "mount", "read", "start", "node", "fetch", "touch", "boot", "vm")
RUNS = 3


def main() -> int:
    own, handed_on = _split(sys.argv[1:])
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    found.add_argument("--runs", type=int, default=RUNS, help=f"rounds of samples [{RUNS}]")
    arguments = found.parse_args(own)
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        found.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    failed = []
    for name in arguments.names or NAMES:
        print(f"== {name}", flush=True)
        script = HERE / f"bench_{name}.py"
        command = [
            sys.executable,
            str(script),
            "--runs",
            str(_runs(name, arguments.runs)),
            *handed_on,
        ]
        code = subprocess.run(command, check=False).returncode
        if code not in (0, SKIPPED):
            failed.append(name)
        print(flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _runs(name: str, runs: int) -> int:
    return 1 if name == "store" else runs  # its bytes are the same every time


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


if __name__ == "__main__":
    raise SystemExit(main())
