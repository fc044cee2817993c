"""`make stress`: IMGSNAP_KILLS (1,000) kills at random moments under verified reads."""

import json
import os

import pytest

from tests.support.kill_site import kill_site

pytestmark = pytest.mark.root

KILLS = int(os.environ.get("IMGSNAP_KILLS", "1000"))
P99_AIM_S = 1.0


@pytest.mark.timeout(3600)
def test_a_thousand_kills(tmp_path, capsys):
    with kill_site(tmp_path, size_mib=64) as (run, supervisor):
        outcome = run.run(KILLS, supervisor=supervisor, damage=tmp_path / "cache", seed=0)
    with capsys.disabled():
        print("\n" + json.dumps(outcome.summary()))
    assert (outcome.wrong, outcome.errors) == ([], [])
    assert outcome.kills == KILLS
    assert outcome.percentile(0.99) < P99_AIM_S
