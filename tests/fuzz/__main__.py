"""Fuzzes for a given time and keeps what breaks a parser; exit code 1 when something did."""

import argparse
import logging
import random
import sys
import time

from tests.fuzz import targets, trust_targets  # noqa: F401  they register themselves
from tests.fuzz.harness import TARGETS, Broken, fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets [60]")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="[all]")
    parser.add_argument("--seed", type=int, help="[by chance]")
    arguments = parser.parse_args()
    logging.disable()
    seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    names = arguments.target or list(TARGETS)
    broken = 0
    for name in names:
        until = time.monotonic() + arguments.seconds / len(names)
        try:
            tried = fuzz(TARGETS[name], seed, until=until)
            print(f"{name}: {tried} inputs, seed {seed}", flush=True)
        except Broken as error:
            broken += 1
            print(f"{error}\n  kept as {error.keep()}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
