"""Ranges as streams: resumed where they broke, ended from another thread, bounded by a deadline."""

import threading
import time

import pytest

from imgsnap.errors import AccessDenied, Unavailable
from imgsnap.oci.cancellation import Cancellation, Cancelled
from imgsnap.oci.connections import ConnectionOptions
from tests.support.oci_images import repository_at
from tests.unit.oci.reading import BLOB, DATA, NAME


@pytest.fixture
def repository(registry):
    with_limit = ConnectionOptions(plain_http=True, read_timeout_s=20)
    opened = repository_at(registry.host, NAME, options=with_limit)
    yield opened
    opened.close()


def asked(registry):
    return [entry.headers["range"] for entry in registry.requests("GET", "/blobs/")]


def test_pieces_arrive_before_the_rest_has_been_sent(registry, repository):
    registry.switches.stall_times, registry.switches.stall_after = 1, 100
    cancellation = Cancellation()
    with repository.open_range(BLOB, 0, 1000, cancellation=cancellation) as stream:
        assert stream.read(60) == DATA[:60]
        assert stream.read(40) == DATA[60:100]
        assert stream.host == registry.host
        cancellation.cancel()
        with pytest.raises(Cancelled):
            stream.read(1)


def test_a_broken_range_continues_at_the_byte_where_it_broke(registry, repository):
    registry.switches.drop_times, registry.switches.drop_after = 2, 30
    assert repository.read_range(BLOB, 100, 100) == DATA[100:200]
    assert asked(registry) == ["bytes=100-199", "bytes=130-199", "bytes=160-199"]


def test_a_stalled_range_is_asked_for_again(registry):
    impatient = ConnectionOptions(plain_http=True, read_timeout_s=0.1)
    repository = repository_at(registry.host, NAME, options=impatient)
    registry.switches.stall_times, registry.switches.stall_after = 1, 30
    with repository.open_range(BLOB, 100, 100) as stream:
        assert stream.read(20) + stream.read(80) == DATA[100:200]
    assert asked(registry) == ["bytes=100-199", "bytes=120-199"]
    repository.close()


@pytest.mark.parametrize("after", [None, 10])
def test_a_waiting_request_can_be_given_up(registry, repository, after):
    registry.switches.stall_times, registry.switches.stall_after = 1, after
    cancellation, outcome = Cancellation(), []

    def read():
        try:
            with repository.open_range(BLOB, 0, 100, cancellation=cancellation) as stream:
                outcome.append(stream.read(100))
        except Cancelled as error:
            outcome.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert registry.stalled.acquire(timeout=20)
    cancellation.cancel()
    thread.join(10)
    assert len(outcome) == 1
    assert isinstance(outcome[0], Cancelled)
    assert len(asked(registry)) == 1
    # The connection that was shut down serves nobody else.
    assert repository.read_range(BLOB, 0, 100) == DATA[:100]


def test_a_reused_connection_can_be_given_up_too(registry, repository):
    assert repository.read_range(BLOB, 0, 100) == DATA[:100]
    registry.switches.stall_times = 1
    cancellation = Cancellation()
    threading.Thread(
        target=lambda: (registry.stalled.acquire(timeout=20), cancellation.cancel())
    ).start()
    with pytest.raises(Cancelled), repository.open_range(BLOB, 0, 9, cancellation=cancellation):
        pass
    assert registry.connections == 1


def test_a_finished_request_leaves_its_connection_alone(registry, repository):
    cancellation = Cancellation()
    with repository.open_range(BLOB, 0, 100, cancellation=cancellation) as stream:
        assert stream.read(100) == DATA[:100]
    cancellation.cancel()
    assert repository.read_range(BLOB, 0, 100) == DATA[:100]
    assert registry.connections == 1


def test_no_attempt_begins_after_the_deadline(registry, repository):
    registry.switches.fail_times = 99
    late = Cancellation(deadline=time.monotonic() - 1)
    with pytest.raises(Unavailable, match="503"):
        repository.open_range(BLOB, 0, 100, cancellation=late).__enter__()
    assert len(asked(registry)) == 1


def test_a_wait_between_attempts_ends_when_it_is_given_up(registry, repository):
    registry.switches.fail_times = 99
    registry.switches.retry_after = "3600"
    cancellation = Cancellation()
    threading.Timer(0.1, cancellation.cancel).start()
    with pytest.raises(Cancelled), repository.open_range(BLOB, 0, 9, cancellation=cancellation):
        pass
    assert len(asked(registry)) == 1


@pytest.mark.parametrize(
    "location", ["http://[", "http://h:99999/x", "https:///x", "gopher://h/", "http://h:0/"]
)
def test_a_redirect_to_nowhere_is_refused(registry, repository, location):
    registry.switches.redirect_location = location
    with pytest.raises(AccessDenied, match="not an http"):
        repository.read_range(BLOB, 0, 10)


@pytest.mark.parametrize("realm", ["http://[", "http://h:99999/", "file:///etc/passwd", "//h/"])
def test_a_token_server_that_is_no_url_is_refused(registry, repository, realm):
    registry.switches.auth, registry.switches.realm = "token", realm
    with pytest.raises(AccessDenied, match="not an http"):
        repository.read_range(BLOB, 0, 10)
