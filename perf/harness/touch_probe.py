"""Reads a share of the files below a directory, whole, in an order fixed by chance.

`python -m harness.touch_probe ROOT SHARE` prints JSON: seconds, files and bytes read. The share is
of the bytes of all regular files.
"""

import json
import random
import sys
import time
from pathlib import Path


def main() -> None:
    root, share = sys.argv[1], float(sys.argv[2])
    files = []
    for path in Path(root).rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            files.append((path, path.stat().st_size))
    files.sort()
    random.Random(3).shuffle(files)
    wanted = share * sum(size for _, size in files)
    count = done = 0
    started = time.perf_counter()
    for path, size in files:
        if done >= wanted:
            break
        with path.open("rb") as file:
            while file.read(1 << 20):
                pass
        count, done = count + 1, done + size
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "files": count, "bytes": done}))


if __name__ == "__main__":
    main()
