"""The property of tests/property/test_faults_property.py, for as long as STRESS_SECONDS says."""

import os
import time

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.property.test_faults_property import check, faults, reads

SECONDS = float(os.environ.get("STRESS_SECONDS", "60"))


@settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a shrunk example is found again by the shorter test
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(
    plan=faults,
    rounds=st.lists(reads, min_size=1, max_size=6),
    auth=st.booleans(),
    redirects=st.booleans(),
    readahead=st.booleans(),
)
def _every_read_is_right_or_an_error(plan, rounds, auth, redirects, readahead):
    check(plan, rounds, auth=auth, redirects=redirects, readahead=readahead)


def test_faults_for_a_while():
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:  # each time from another seed
        _every_read_is_right_or_an_error()
