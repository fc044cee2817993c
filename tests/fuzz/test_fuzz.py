"""A short run of each fuzz target, and all inputs that were ever kept."""

import logging
import os
import random

import pytest

from tests.fuzz import targets, trust_targets  # noqa: F401  they register themselves
from tests.fuzz.harness import TARGETS, attempt, fuzz

INPUTS = 4000


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
def test_a_value_or_one_of_our_errors(name):
    seed = int(os.environ.get("FUZZ_SEED") or random.randrange(1 << 32))
    print(f"FUZZ_SEED={seed}")
    assert fuzz(TARGETS[name], seed, count=INPUTS // TARGETS[name].cost)


@pytest.mark.parametrize("name", TARGETS)
def test_the_kept_corpus(name):
    for data in [*TARGETS[name].seeds(), *TARGETS[name].kept()]:
        attempt(TARGETS[name], data)
