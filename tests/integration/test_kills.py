"""The short form of `make stress`: block servers killed under readers that check every byte."""

import pytest

from tests.support.kill_site import kill_site

pytestmark = pytest.mark.root


def test_readers_get_right_bytes_however_often_the_server_is_killed(tmp_path):
    with kill_site(tmp_path, size_mib=12) as (run, supervisor):
        outcome = run.run(40, supervisor=supervisor, damage=tmp_path / "cache", seed=1)
    assert (outcome.wrong, outcome.errors) == ([], [])
    assert outcome.kills == 40
    assert outcome.reads > 100
