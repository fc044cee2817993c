"""Mirrors of a registry: who is asked, in which order, and what happens when they fail."""

import pytest

from imgsnap.errors import InvalidArgument, NotFound, Unavailable, Unsupported
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.mirrors import COOL_S
from imgsnap.oci.reference import parse_location
from imgsnap.oci.retry import RetryPolicy
from tests.support.oci_images import FakeTime
from tests.support.registry import ScriptedRegistry
from tests.unit.oci.reading import BLOB, DATA, NAME

INDEX = b'{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}'
OTHER = INDEX.replace(b"[]", b"[]  ")


@pytest.fixture
def mirror():
    with ScriptedRegistry() as scripted:
        scripted.add_blob(NAME, DATA)
        yield scripted


@pytest.fixture
def opened(tmp_path, registry, mirror):
    """Opens the registry's repository with `mirror` before it; `table` is the mirror's."""
    made = []

    def make(table="", *, path="", time=None, server="", create=False, **settings):
        directory = tmp_path / registry.host
        directory.mkdir(exist_ok=True)
        (directory / "hosts.toml").write_text(
            f'{server}\n[host."http://{mirror.host}{path}"]\n{table}\n'
        )
        time = time or FakeTime()
        retry = RetryPolicy(attempts_max=3, sleep=time.sleep, clock=time.clock)
        options = RegistryOptions(plain_http=True, hosts_dir=tmp_path, retry=retry, **settings)
        location = parse_location(f"{registry.host}/{NAME}:tag")
        repository, _ = open_repository(
            location, options, store=tmp_path, environ={}, create=create
        )
        made.append(repository)
        return repository

    yield make
    for repository in made:
        repository.close()


def ranges(scripted):
    return len(scripted.requests("GET", "/blobs/"))


def test_the_mirror_serves_and_is_told_whose_mirror_it_is(opened, registry, mirror):
    repository = opened()
    with repository.open_range(BLOB, 5, 50) as stream:
        assert stream.read(50) == DATA[5:55]
        assert stream.host == mirror.host
    assert repository.blob(BLOB, size_max=1 << 20) == DATA
    assert ranges(registry) == 0
    assert all(entry.query["ns"] == [registry.host] for entry in mirror.log)
    assert repository.name == f"{registry.host}/{NAME}"


@pytest.mark.parametrize(
    "fault",
    [
        {"fail_times": 99},
        {"fail_times": 99, "fail_status": 404},
        {"fail_times": 99, "fail_status": 403},
        {"fail_times": 99, "fail_status": 400},
        {"drop_times": 99, "drop_after": 0},
        {"drop_times": 99, "drop_after": 7},
        {"ignore_ranges": True},
        {"shift_range": 1},
        {"truncate_times": 99},
    ],
)
def test_a_failing_mirror_is_passed_over_and_then_asked_last(opened, registry, mirror, fault):
    repository = opened()
    vars(mirror.switches).update(fault)
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]
    if fault != {"drop_times": 99, "drop_after": 7}:  # this one is slow, and still serves
        asked = ranges(mirror)
        assert repository.read_range(BLOB, 60, 50) == DATA[60:110]
        assert ranges(mirror) == asked
        assert ranges(registry) == 2


def test_a_cooled_mirror_is_asked_first_again(opened, registry, mirror, monkeypatch):
    repository = opened()
    now = [1000.0]
    repository._clock = lambda: now[0]
    mirror.switches.fail_times = 99
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]
    mirror.switches.fail_times = 0
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]
    assert ranges(registry) == 2
    now[0] += COOL_S + 1
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]
    assert ranges(registry) == 2


def test_a_cool_mirror_is_better_than_none(opened, registry, mirror):
    repository = opened()
    mirror.switches.fail_times = 2
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]
    registry.switches.fail_times = 99
    assert repository.read_range(BLOB, 5, 50) == DATA[5:55]


def test_a_transfer_that_breaks_for_good_goes_on_elsewhere(opened, registry, mirror):
    repository = opened()
    with repository.open_range(BLOB, 0, 1000) as stream:
        assert stream.read(10) == DATA[:10]
    mirror.switches.drop_times, mirror.switches.drop_after = 1, 100
    with repository.open_range(BLOB, 0, 1000) as stream:
        assert stream.read(100) == DATA[:100]
        mirror.switches.fail_times = 99
        assert stream.read(900) == DATA[100:1000]
        assert stream.host == registry.host
    assert registry.requests("GET", "/blobs/")[0].headers["range"] == "bytes=100-999"


def test_rejected_bytes_cool_their_host(opened, registry, mirror):
    repository = opened()
    mirror.switches.corrupt = {BLOB.digest}
    with repository.open_range(BLOB, 0, 10) as stream:
        assert stream.read(10) != DATA[:10]
        stream.reject()
    assert repository.read_range(BLOB, 0, 10) == DATA[:10]
    assert ranges(registry) == 1


def test_damaged_small_blobs_come_from_the_next_host(opened, registry, mirror):
    mirror.switches.corrupt = {BLOB.digest}
    assert opened().blob(BLOB, size_max=1 << 20) == DATA
    assert ranges(registry) == 1


def test_a_second_request_goes_to_another_host(opened, registry, mirror):
    with opened().open_range(BLOB, 0, 10, second=True) as stream:
        assert stream.read(10) == DATA[:10]
        assert stream.host == registry.host


def test_tags_are_believed_from_hosts_that_may_resolve(opened, registry, mirror):
    kind = "application/vnd.oci.image.index.v1+json"
    right = registry.add_manifest(NAME, INDEX, kind, "tag")
    mirror.add_manifest(NAME, OTHER, kind, "tag")
    mirror.add_manifest(NAME, INDEX, kind)
    distrusted = opened('capabilities = ["pull"]')
    assert distrusted.manifest("tag").raw == INDEX
    assert mirror.log == []
    assert distrusted.manifest(right).raw == INDEX
    assert len(mirror.log) == 1
    assert opened('capabilities = ["pull", "resolve"]').manifest("tag").raw == OTHER


def test_a_mirror_that_only_resolves_serves_no_blobs(opened, registry, mirror):
    assert opened('capabilities = ["resolve"]').read_range(BLOB, 0, 10) == DATA[:10]
    assert ranges(mirror) == 0


def test_what_no_host_has_is_the_registrys_answer(opened, registry, mirror):
    repository = opened()
    mirror.switches.fail_times = 99
    with pytest.raises(NotFound, match=registry.host):
        repository.manifest("sha256:" + "0" * 64)
    registry.switches.fail_times = 99
    with pytest.raises(Unavailable, match=registry.host):
        repository.read_range(BLOB, 0, 10)
    with pytest.raises(InvalidArgument):
        repository.read_range(BLOB, len(DATA), 10)


def test_a_path_before_the_repository(opened, mirror):
    mirror.add_blob(f"proxy/{NAME}", DATA)
    mirror.switches.auth = "token"
    repository = opened("override_path = true", path="/v2/proxy")
    repository.read_range(BLOB, 0, 10)  # the mirror wants a login, so the registry serves it
    assert mirror.requests("GET", f"/v2/proxy/{NAME}/blobs/")
    asked = mirror.requests("GET", "/token")[0].query
    assert asked["scope"] == [f"repository:proxy/{NAME}:pull"]


def test_writes_go_to_the_first_host_that_may_be_pushed_to(opened, registry, mirror):
    both = opened('capabilities = ["pull"]', create=True)
    both.put_bytes(BLOB, DATA)
    assert registry.requests("HEAD")
    assert not mirror.log
    with pytest.raises(Unsupported, match="push"):
        opened('capabilities = ["pull"]', server='capabilities = ["pull"]', create=True)


def test_blobs_and_lists_are_looked_for_at_every_host(opened, registry, mirror):
    absent = BLOB.__class__("text/plain", "sha256:" + "1" * 64, 4)
    repository = opened()
    assert repository.has_blob(BLOB)
    assert not repository.has_blob(absent)
    assert repository.referrers(BLOB.digest, "") == []
    registry.add_manifest(NAME, INDEX, "application/vnd.oci.image.index.v1+json", "only-here")
    assert repository.tags() == []  # the mirror's answer counts, as for any tag
    with repository.open_blob(BLOB) as stream:
        assert stream.read(100) == DATA[:100]
