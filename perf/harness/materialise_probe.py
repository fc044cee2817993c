"""Writes a snapshot's device as a plain file.

materialise_probe STORE CACHE RUN_DIR REFERENCE FILE
"""

import sys
from contextlib import ExitStack
from pathlib import Path

from harness.product import open_places
from imgsnap.blockstore.materialise import materialise


def main(arguments: list[str]) -> None:
    places, _ = open_places(*arguments[:3])
    with ExitStack() as stack:
        materialise(places.snapshot(stack, arguments[3], None), Path(arguments[4]))


if __name__ == "__main__":
    main(sys.argv[1:])
