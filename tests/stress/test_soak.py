"""A soak: mounts, reads, faults and evictions of one process for STRESS_SECONDS."""

import os
import random

import pytest

from imgsnap.units import MIB
from tests.support.soak import WARM_ROUNDS, soak

GROWTH_MAX = 48 * MIB


@pytest.mark.root
@pytest.mark.root
def test_soak(tmp_path):
    check_soak(float(os.environ.get("STRESS_SECONDS", "60")), tmp_path)


def check_soak(seconds, directory):
    seed = random.randrange(1 << 32)
    outcome = soak(seconds, directory, seed)
    print(f"seed {seed}: {outcome}")
    assert outcome.reads > outcome.rounds
    assert max(outcome.files[WARM_ROUNDS:]) <= outcome.files[0] + 2
    assert outcome.grown < GROWTH_MAX
