"""Transport and registry reads against a scripted registry: retries, ranges, redirects."""

import datetime
import socket
import time
from contextlib import ExitStack, closing

import pytest

from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    IntegrityError,
    InvalidArgument,
    Unavailable,
)
from imgsnap.oci.connections import ConnectionOptions
from imgsnap.oci.repository import RangeUnsupported
from imgsnap.oci.retry import retry_after_s
from tests.support.oci_images import FakeTime, descriptor_of, repository_at
from tests.unit.oci.reading import BLOB, DATA, NAME, read

# Retries


def test_tries_again_after_5xx_with_growing_waits(registry):
    registry.switches.fail_times = 3
    time = FakeTime()
    assert read(registry, time=time) == DATA[100:150]
    assert len(time.slept) == 3
    assert time.slept == sorted(time.slept)
    assert 0.1 <= time.slept[0] <= 0.2


def test_gives_up_with_status_code_and_hint(registry):
    registry.switches.fail_times = 99
    registry.switches.fail_status = 429
    with pytest.raises(Unavailable, match="HTTP 429 TOOMANYREQUESTS: slow down") as caught:
        read(registry)
    assert "rate" in caught.value.hint
    assert caught.value.refusal.status == 429
    assert len(registry.log) == 4


def test_honours_retry_after_within_reason(registry):
    registry.switches.fail_times = 1
    registry.switches.fail_status = 429
    registry.switches.retry_after = "7"
    time = FakeTime()
    assert read(registry, time=time) == DATA[100:150]
    assert time.slept == [7.0]
    registry.switches.fail_times = 1
    registry.switches.retry_after = "86400"
    assert read(registry, time=time) == DATA[100:150]
    assert time.slept[1:] == [60.0]


def test_the_deadline_ends_the_retries(registry):
    registry.switches.fail_times = 99
    registry.switches.retry_after = "60"
    time = FakeTime()
    with pytest.raises(Unavailable):
        read(registry, time=time, attempts_max=99)
    assert sum(time.slept) <= 300


def test_retry_after_forms():
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    assert retry_after_s("120", now=now) == 120.0
    assert retry_after_s("Thu, 01 Jan 2026 00:00:30 GMT", now=now) == 30.0
    assert retry_after_s("Thu, 01 Jan 2015 00:00:30 GMT", now=now) == 0.0
    for text in (None, "", "soon", "-5", "9" * 400, "١٢"):
        got = retry_after_s(text, now=now)
        assert got is None or 0 <= got <= 86_400 * 365


def test_a_client_error_is_not_retried(registry):
    registry.switches.fail_times = 1
    registry.switches.fail_status = 400
    with pytest.raises(InvalidArgument):
        read(registry)
    assert len(registry.log) == 1


def test_no_listener_is_unavailable():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(Unavailable) as caught:
        repository_at(f"127.0.0.1:{port}").tags()
    assert caught.value.hint


def test_a_registry_that_is_away_is_waited_for_once(registry):
    time = FakeTime()
    repository = repository_at(registry.host, NAME, time=time)
    registry.switches.drop_times, registry.switches.drop_after = 99, 0
    with pytest.raises(Unavailable):
        repository.read_range(BLOB, 100, 50)
    waited = len(time.slept)
    assert waited > 1
    for _ in range(3):
        with pytest.raises(Unavailable):
            repository.read_range(BLOB, 100, 50)
    assert len(time.slept) == waited

    registry.switches.drop_times = 0
    assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    registry.switches.fail_times = 2  # it answers again, so it is worth waiting for again
    assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    assert len(time.slept) == waited + 2
    repository.close()


# Ranges and bodies


def test_reads_closed_ranges_and_counts(registry):
    repository = repository_at(registry.host, NAME)
    assert repository.read_range(BLOB, 0, 1) == DATA[:1]
    assert repository.read_range(BLOB, len(DATA) - 5, 5) == DATA[-5:]
    assert repository.read_range(BLOB, 0, len(DATA)) == DATA
    assert repository.read_range(BLOB, 7, 0) == b""
    assert [entry.headers["range"] for entry in registry.log] == [
        "bytes=0-0",
        f"bytes={len(DATA) - 5}-{len(DATA) - 1}",
        f"bytes=0-{len(DATA) - 1}",
    ]
    counts = repository.transport.stats.snapshot()
    assert counts["requests"] == counts["status_206"] == 3
    assert counts["bytes_received"] == len(DATA) + 6
    repository.close()


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, -1), (len(DATA), 1), (5, len(DATA))])
def test_ranges_outside_the_blob_are_not_sent(registry, offset, length):
    with pytest.raises(InvalidArgument):
        repository_at(registry.host, NAME).read_range(BLOB, offset, length)
    assert registry.log == []


def test_a_whole_blob_for_a_range_is_not_read(registry):
    big = bytes(20 << 20)
    registry.add_blob(NAME, big)
    registry.switches.ignore_ranges = True
    repository = repository_at(registry.host, NAME)
    with pytest.raises(RangeUnsupported):
        repository.read_range(descriptor_of(big), 5, 10)
    assert repository.transport.stats.get("bytes_received") == 0
    assert repository.read_range(BLOB, 0, len(DATA)) == DATA  # the whole is what was asked for
    repository.close()


@pytest.mark.parametrize(
    "said", ["bytes 0-49/10240", "bytes 100-148/10240", "", "bytes */10240", "100-149", "x" * 9999]
)
def test_another_part_than_asked_is_refused(registry, said):
    registry.switches.content_range = said
    with pytest.raises(RangeUnsupported):
        read(registry)


def test_a_shifted_part_is_refused(registry):
    registry.switches.shift_range = 1
    with pytest.raises(RangeUnsupported):
        read(registry)


def test_an_unknown_total_is_fine_and_a_wrong_one_is_damage(registry):
    registry.switches.content_range = "bytes 100-149/*"
    assert read(registry) == DATA[100:150]
    registry.switches.content_range = "bytes 100-149/999"
    with pytest.raises(IntegrityError):
        read(registry)


def test_a_short_body_with_matching_length_is_no_range(registry):
    registry.switches.truncate_times = 1
    with pytest.raises(RangeUnsupported):
        read(registry)


def test_a_connection_that_drops_in_a_range_is_tried_again(registry):
    registry.switches.drop_times = 2
    assert read(registry) == DATA[100:150]
    assert len(registry.log) == 3


def test_416_is_no_range(registry):
    bigger = descriptor_of(DATA)
    bigger = type(bigger)(bigger.media_type, bigger.digest, len(DATA) + 100)
    with pytest.raises(RangeUnsupported):
        repository_at(registry.host, NAME).read_range(bigger, len(DATA) + 10, 5)


# Streams


def stream(repository, descriptor=BLOB, size=1000):
    with repository.open_blob(descriptor) as file:
        return b"".join(iter(lambda: file.read(size), b""))


def test_a_broken_stream_continues_with_a_closed_range(registry):
    registry.switches.drop_times = 3
    registry.switches.drop_after = 3000
    repository = repository_at(registry.host, NAME)
    assert stream(repository) == DATA
    ranges = [entry.headers.get("range") for entry in registry.log]
    assert ranges[0] is None
    assert all(text.endswith(f"-{len(DATA) - 1}") for text in ranges[1:])
    assert len(ranges) == 4
    repository.close()


def test_a_broken_stream_without_ranges_starts_again(registry):
    registry.switches.ignore_ranges = True
    registry.switches.drop_times = 1
    registry.switches.drop_after = 3000
    assert stream(repository_at(registry.host, NAME)) == DATA


def test_a_stream_that_cannot_be_resumed_ends_unavailable(registry):
    registry.switches.drop_times = 99
    registry.switches.drop_after = 0
    with pytest.raises(Unavailable):
        stream(repository_at(registry.host, NAME))


def test_a_blob_of_another_size_is_damage(registry):
    for size in (len(DATA) - 1, len(DATA) + 1):
        wrong = type(BLOB)(BLOB.media_type, BLOB.digest, size)
        with pytest.raises(IntegrityError):
            stream(repository_at(registry.host, NAME), wrong)


def test_small_blobs_are_verified(registry):
    repository = repository_at(registry.host, NAME)
    assert repository.blob(BLOB, size_max=1 << 20) == DATA
    registry.switches.corrupt.add(BLOB.digest)
    with pytest.raises(DigestMismatch):
        repository.blob(BLOB, size_max=1 << 20)
    repository.close()


# Redirects


def test_redirects_are_followed_and_remembered(registry, auth_file):
    registry.switches.redirect_blobs = True
    registry.switches.auth = "token"
    options = ConnectionOptions(plain_http=True, headers=(("X-Dragonfly", "1"),))
    repository = repository_at(registry.host, NAME, auth_file=auth_file, options=options)
    for _ in range(3):
        assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    storage = registry.requests(server="storage")
    assert len(storage) == 3
    assert all("authorization" not in entry.headers for entry in storage)
    assert all("x-dragonfly" not in entry.headers for entry in storage)
    assert all(entry.query == {"signature": ["secret"]} for entry in storage)
    served = [e for e in registry.requests(part="/blobs/", server="registry") if e.status == 307]
    assert len(served) == 1
    assert served[0].headers["x-dragonfly"] == "1"
    repository.close()


def test_dead_redirects_are_resolved_again(registry):
    registry.switches.redirect_blobs = True
    registry.switches.redirect_uses = 2
    repository = repository_at(registry.host, NAME)
    for _ in range(5):
        assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    assert len(registry.requests(server="registry")) == 3
    registry.kill_redirects()
    registry.switches.redirect_dead_status = 401
    assert repository.read_range(BLOB, 100, 50) == DATA[100:150]
    repository.close()


def test_remembered_redirects_grow_old(registry):
    registry.switches.redirect_blobs = True
    time = FakeTime()
    repository = repository_at(registry.host, NAME, time=time)
    repository.read_range(BLOB, 0, 5)
    time.now_s += 121
    repository.read_range(BLOB, 0, 5)
    assert len(registry.requests(server="registry")) == 2
    repository.close()


def test_a_target_that_always_refuses_ends(registry):
    registry.switches.redirect_blobs = True
    registry.switches.redirect_uses = 0
    with pytest.raises(AccessDenied) as caught:
        read(registry)
    assert "secret" not in str(caught.value)
    assert len(registry.requests(server="storage")) == 2


def test_streams_resume_through_redirects(registry):
    registry.switches.redirect_blobs = True
    registry.switches.redirect_uses = 1
    registry.switches.drop_times = 2
    registry.switches.drop_after = 3000
    assert stream(repository_at(registry.host, NAME)) == DATA


@pytest.mark.parametrize("location", ["ftp://x/y", "file:///etc/passwd", "gopher://x"])
def test_redirects_to_other_schemes_are_refused(registry, location):
    registry.switches.redirect_location = location
    with pytest.raises(AccessDenied):
        read(registry)


def test_redirect_loops_end(registry):
    registry.switches.redirect_location = f"http://{registry.host}/v2/{NAME}/blobs/{BLOB.digest}"
    with pytest.raises(Unavailable, match="redirects"):
        read(registry)


def test_connections_are_kept_across_redirects(registry):
    registry.switches.redirect_blobs = True
    registry.switches.redirect_uses = 1
    repository = repository_at(registry.host, NAME)
    for _ in range(10):
        repository.read_range(BLOB, 0, 5)
    assert registry.connections <= 2  # one to the registry, one to its storage
    repository.close()


def test_has_blob_does_not_follow_redirects(registry):
    repository = repository_at(registry.host, NAME)
    assert repository.has_blob(BLOB)
    assert not repository.has_blob(descriptor_of(b"absent"))
    registry.switches.redirect_blobs = True
    assert repository.has_blob(BLOB)
    assert registry.requests(server="storage") == []
    repository.close()


# Connections


def test_requests_find_connections_that_were_opened_for_them(registry):
    with closing(repository_at(registry.host)) as repository:
        repository.expect(4)
        deadline = time.monotonic() + 20
        while registry.connections < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.1)  # from accepted there to idle here
        descriptor = descriptor_of(DATA)
        with ExitStack() as held:
            streams = [held.enter_context(repository.open_blob(descriptor)) for _ in range(4)]
            assert [stream.read(10) for stream in streams] == [DATA[:10]] * 4
        assert registry.connections == 4


def test_connections_that_cannot_be_opened_are_no_matter():
    with closing(repository_at("127.0.0.1:1")) as repository:
        repository.expect(2)
