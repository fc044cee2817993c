"""As tests/integration/test_snapshotter_kills.py, for as long as asked."""

import os
import tempfile
import time
from pathlib import Path

from tests.support.snapshot_storm import storm
from tests.support.snapshotter import Snapshotter

SECONDS = float(os.environ.get("STRESS_SECONDS", "60"))


def test_kills_in_a_storm():
    end, seed = time.monotonic() + SECONDS, time.time_ns()
    while time.monotonic() < end:
        with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work:
            snapshotter = Snapshotter(Path(work))
            try:
                calls = storm(snapshotter, kills=20, seed=seed)
                print(f"seed {seed}: {calls} calls")
            finally:
                if snapshotter.process is not None:
                    snapshotter.kill()
        seed += 1
