"""A few seconds of the soak in tests/stress."""

import pytest

from tests.stress.test_soak import check_soak


@pytest.mark.root
@pytest.mark.root
def test_a_short_soak(tmp_path):
    check_soak(6, tmp_path)
