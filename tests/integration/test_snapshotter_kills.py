"""A storm of calls over gRPC, and SIGKILL at random moments."""

import tempfile
from pathlib import Path

import pytest

from tests.support.snapshot_storm import storm
from tests.support.snapshotter import Snapshotter

pytestmark = [pytest.mark.slow]


def test_kills_in_a_storm():
    with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work:
        snapshotter = Snapshotter(Path(work))
        try:
            assert storm(snapshotter, kills=12, seed=4) > 50
        finally:
            if snapshotter.process is not None:
                snapshotter.kill()
