"""The fetcher over a mirror and its registry: whoever fails, readers get right bytes."""

import pytest

from imgsnap.oci.mirrors import Member, MirroredRepository
from tests.support.block_store import open_store
from tests.support.faulty_store import publish, repository
from tests.support.registry import ScriptedRegistry
from tests.support.snapshots import build_snapshot, random_device


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(600), extents=2, packs=2)


@pytest.fixture
def hosts(built):
    with ScriptedRegistry() as mirror, ScriptedRegistry() as origin:
        for registry in (mirror, origin):
            publish(registry, built)
        yield mirror, origin


@pytest.fixture
def mirrored(hosts):
    members = [Member(repository(registry), registry.host) for registry in hosts]
    opened = MirroredRepository("origin/team/app", members)
    yield opened
    opened.close()


def test_a_good_mirror_serves_everything_and_the_counters_say_so(built, hosts, mirrored, tmp_path):
    with open_store(mirrored, tmp_path) as store:
        assert store.reader.read(0, len(built.device)) == built.device
        served = store.statistics.hosts
        assert set(served) == {hosts[0].host}
        assert served[hosts[0].host].bytes == store.statistics.demand.bytes
        assert served[hosts[0].host].requests == store.statistics.demand.requests
    assert not hosts[1].log


def test_a_mirror_that_sends_damaged_packs_is_asked_no_more(built, hosts, mirrored, tmp_path):
    mirror, origin = hosts
    with open_store(mirrored, tmp_path, threads=1) as store:
        mirror.switches.corrupt = set(built.packs)
        # The first byte of each pack is wrong; the second pack comes from the registry.
        assert store.reader.read(0, len(built.device)) == built.device
        assert store.statistics.source_damage == 1
        assert store.statistics.failures == 0
        assert origin.host in store.statistics.hosts


def test_a_mirror_that_goes_away_in_the_middle(built, hosts, mirrored, tmp_path):
    mirror, _ = hosts
    with open_store(mirrored, tmp_path) as store:
        half = len(built.device) // 2
        assert store.reader.read(0, half) == built.device[:half]
        mirror.switches.fail_times = 999
        assert store.reader.read(half, half) == built.device[half : 2 * half]
        assert store.statistics.failures == 0
