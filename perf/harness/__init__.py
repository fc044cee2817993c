"""What the benchmarks share: measuring, images, servers, tables."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "perf" / "results"

for _directory in (ROOT, ROOT / "cli"):  # scripts are started by path, from anywhere
    if str(_directory) not in sys.path:
        sys.path.insert(0, str(_directory))
