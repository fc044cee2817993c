"""SIGKILL before every step of a series of calls; see tests/support/snapshot_crash.py."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def test_no_kill_leaves_anything_half_done():
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # it syncs a lot
    with tempfile.TemporaryDirectory(dir=memory) as root:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.snapshot_crash", root],
            cwd=Path(__file__).parents[3],
            env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 80, "the series has that many steps"
