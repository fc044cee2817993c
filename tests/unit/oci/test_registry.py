"""Manifests, uploads, tags and referrers against a scripted registry."""

import json

import pytest

from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    FormatError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from imgsnap.oci import media_types
from imgsnap.oci.manifest import parse_index
from imgsnap.oci.registry_referrers import fallback_tag
from imgsnap.oci.repository import Descriptor
from tests.support.oci_images import artifact, descriptor_of, push_image, repository_at
from tests.support.registry import ScriptedRegistry

NAME = "team/app"


@pytest.fixture
def registry():
    with ScriptedRegistry() as scripted:
        yield scripted


@pytest.fixture
def repository(registry):
    opened = repository_at(registry.host, NAME)
    yield opened
    opened.close()


# Manifests


def test_manifests_by_tag_and_digest(repository):
    pushed = push_image(repository, "v1")
    assert repository.manifest("v1") == pushed
    assert repository.manifest(pushed.descriptor.digest) == pushed
    with pytest.raises(NotFound):
        repository.manifest("v2")
    assert repository.name.endswith("/team/app")


def test_wrong_bytes_under_a_digest_are_refused(registry, repository):
    pushed = push_image(repository, "v1")
    registry.switches.corrupt.add(pushed.descriptor.digest)
    with pytest.raises(DigestMismatch):
        repository.manifest(pushed.descriptor.digest)
    with pytest.raises(DigestMismatch):
        repository.manifest("v1")  # Docker-Content-Digest says otherwise


def test_a_false_content_digest_is_refused_unless_it_cannot_be_checked(registry, repository):
    push_image(repository, "v1")
    registry.switches.content_digest = "sha256:" + "0" * 64
    with pytest.raises(DigestMismatch):
        repository.manifest("v1")
    registry.switches.content_digest = "sha512:" + "0" * 128
    repository.manifest("v1")


def test_manifests_are_bounded_and_parsed(registry, repository):
    registry.add_manifest(NAME, b" " * (5 << 20), media_types.OCI_MANIFEST, "huge")
    registry.add_manifest(NAME, b"<html>", "text/html", "html")
    with pytest.raises(LimitExceeded):
        repository.manifest("huge")
    with pytest.raises(FormatError):
        repository.manifest("html")
    with pytest.raises(InvalidArgument):
        repository.manifest("../../x")


# Uploads


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("query", [True, False])
def test_uploads_are_one_put_with_a_length(registry, repository, tmp_path, relative, query):
    registry.switches.relative_location = relative
    registry.switches.location_query = query
    data = bytes(range(256)) * 8192
    path = tmp_path / "blob"
    path.write_bytes(data)
    descriptor = descriptor_of(data)
    repository.put_blob(descriptor, path)
    assert registry.blob(NAME, descriptor.digest) == data
    assert [entry.method for entry in registry.log] == ["HEAD", "POST", "PUT"]
    assert registry.log[2].headers["content-length"] == str(len(data))
    repository.put_blob(descriptor, path)
    assert [entry.method for entry in registry.log[3:]] == ["HEAD"]
    assert repository.transport.stats.get("bytes_sent") == len(data)


def test_an_empty_blob_can_be_uploaded(registry, repository):
    descriptor = descriptor_of(b"")
    repository.put_bytes(descriptor, b"")
    assert registry.blob(NAME, descriptor.digest) == b""
    assert repository.blob(descriptor, size_max=0) == b""


def test_uploads_are_checked_before_and_after(registry, repository, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(b"abc")
    wrong = descriptor_of(b"abcd")
    with pytest.raises(InvalidArgument):
        repository.put_blob(wrong, path)
    with pytest.raises(DigestMismatch):
        repository.put_bytes(wrong, b"abcx")
    same_size = descriptor_of(b"xyz")
    with pytest.raises(InvalidArgument, match="DIGEST_INVALID"):
        repository.put_blob(same_size, path)
    assert registry.blob(NAME, same_size.digest) is None


def test_a_failed_upload_is_begun_anew(registry, repository):
    real = registry.answer
    failures = [1, 1]

    def answer(request, body):
        if request.command == "PUT" and failures:
            failures.pop()
            return type(real(request, body))(502)
        return real(request, body)

    registry.answer = answer
    descriptor = descriptor_of(b"data")
    repository.put_bytes(descriptor, b"data")
    assert registry.blob(NAME, descriptor.digest) == b"data"


def test_uploads_ask_for_push(registry, tmp_path):
    registry.switches.auth = "token"
    path = tmp_path / "c.json"
    entry = {"username": registry.username, "password": registry.password}
    path.write_text(json.dumps({"auths": {registry.host: entry}}))
    repository = repository_at(registry.host, NAME, auth_file=path)
    push_image(repository, "v1")
    scopes = {entry.query["scope"][0] for entry in registry.requests(part="/token")}
    assert scopes == {f"repository:{NAME}:pull", f"repository:{NAME}:pull,push"}
    repository.close()


def test_denied_uploads_are_denied(registry, repository):
    registry.switches.auth = "basic"
    with pytest.raises(AccessDenied):
        repository.put_bytes(descriptor_of(b"x"), b"x")


# Mounts


def test_mounts_within_a_registry(registry, repository):
    descriptor = descriptor_of(b"shared")
    source = repository_at(registry.host, "base/image")
    source.put_bytes(descriptor, b"shared")
    before = len(registry.log)
    assert repository.mount_blob(descriptor, source)
    assert registry.blob(NAME, descriptor.digest) == b"shared"
    assert [entry.query for entry in registry.log[before:]] == [
        {"mount": [descriptor.digest], "from": ["base/image"]}
    ]
    source.close()


def test_refused_mounts_leave_no_session(registry, repository):
    registry.switches.mounts = False
    source = repository_at(registry.host, "base/image")
    assert not repository.mount_blob(descriptor_of(b"x"), source)
    assert [entry.method for entry in registry.log] == ["POST", "DELETE"]
    assert registry.log[1].status == 204
    registry.switches.fail_times = 1
    registry.switches.fail_status = 404
    assert not repository.mount_blob(descriptor_of(b"x"), source)
    source.close()


def test_no_mounts_across_registries(registry, repository):
    with ScriptedRegistry() as other:
        assert not repository.mount_blob(descriptor_of(b"x"), repository_at(other.host))
    assert registry.log == []


# Tags


def test_tags_with_and_without_pages(registry, repository):
    assert repository.tags() == []
    names = [f"v{number:03}" for number in range(25)] + ["latest"]
    registry.add_manifest(NAME, b"{}", media_types.OCI_MANIFEST, *names)
    assert repository.tags() == sorted(names)
    registry.switches.tag_page = 4
    assert repository.tags() == sorted(names)
    assert repository.tags("v01") == names[10:20]
    registry.switches.null_tags = True
    assert repository.tags() == []


def test_tag_pages_that_never_end(registry, repository):
    real = registry._tags

    def again(request, name, item, query, body):
        answer = real(request, name, item, {}, body)
        link = {"Link": f'</v2/{NAME}/tags/list?last=x>; rel="next"'}
        return type(answer)(answer.status, {**answer.headers, **link}, answer.body)

    registry._tags = again
    registry.add_manifest(NAME, b"{}", media_types.OCI_MANIFEST, "a", "b")
    assert repository.tags() == ["a", "b"]


def test_pages_on_another_server_are_refused(registry, repository):
    def elsewhere(request, name, item, query, body):
        from tests.support.registry import Answer

        return Answer(200, {"Link": '<http://evil.example/>; rel="next"'}, b'{"tags":["a"]}')

    registry._tags = elsewhere
    with pytest.raises(Unavailable):
        repository.tags()


# Referrers

MODES = ["api", "404", "html", "html200", "400", "405", "501"]


@pytest.mark.parametrize("mode", MODES)
def test_referrers_are_found_whatever_the_registry_has(registry, repository, mode):
    registry.switches.referrers = mode
    image = push_image(repository, "v1")
    subject = image.descriptor.digest
    assert repository.referrers(subject, media_types.ARTIFACT_SNAPSHOT) == []
    first, second = artifact(repository, image), artifact(repository, image, b"other pack")
    for manifest in (first, second, first):
        repository.put_manifest(manifest, subject=subject)
    found = repository.referrers(subject, media_types.ARTIFACT_SNAPSHOT)
    assert {entry.digest for entry in found} == {
        first.descriptor.digest,
        second.descriptor.digest,
    }
    assert len(found) == 2
    assert {entry.artifact_type for entry in found} == {media_types.ARTIFACT_SNAPSHOT}
    assert repository.referrers(subject, "another/type") == []
    assert len(repository.referrers(subject, "")) == 2
    assert (fallback_tag(subject) in repository.tags()) == (mode != "api")


def test_the_fallback_index_keeps_what_others_wrote(registry, repository):
    registry.switches.referrers = "404"
    image = push_image(repository, "v1")
    tag = fallback_tag(image.descriptor.digest)
    foreign = {
        "mediaType": media_types.OCI_MANIFEST,
        "digest": "sha256:" + "1" * 64,
        "size": 5,
        "artifactType": "application/x-signature",
        "annotations": {"k": "v"},
        "data": "eA==",
    }
    index = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": [foreign],
        "annotations": {"owner": "other"},
        "future": [1],
    }
    registry.add_manifest(NAME, json.dumps(index).encode(), media_types.OCI_INDEX, tag)
    manifest = artifact(repository, image)
    repository.put_manifest(manifest)  # the subject is read from the manifest
    stored = json.loads(registry.tag(NAME, tag))
    assert stored["manifests"][0] == foreign
    assert stored["annotations"] == {"owner": "other"}
    assert stored["future"] == [1]
    entry = parse_index(registry.tag(NAME, tag)).manifests[1]
    assert entry.digest == manifest.descriptor.digest
    assert entry.artifact_type == media_types.ARTIFACT_SNAPSHOT
    assert entry.annotations == {"io.imgsnap.note": "größer"}
    assert len(repository.referrers(image.descriptor.digest, "application/x-signature")) == 1


def test_a_lost_race_for_the_fallback_tag_is_repeated(registry, repository):
    registry.switches.referrers = "404"
    image = push_image(repository, "v1")
    subject = image.descriptor.digest
    registry.switches.lose_tag_writes = 2
    repository.put_manifest(artifact(repository, image), subject=subject)
    assert len(repository.referrers(subject, media_types.ARTIFACT_SNAPSHOT)) == 1
    registry.switches.lose_tag_writes = 99
    with pytest.raises(Unavailable, match="other writers"):
        repository.put_manifest(artifact(repository, image, b"2"), subject=subject)


def test_types_that_the_list_lacks_are_read_from_the_manifests(registry, repository):
    image = push_image(repository, "v1")
    repository.put_manifest(artifact(repository, image), subject=image.descriptor.digest)
    registry.switches.filters = False
    registry.switches.drop_artifact_types = True
    found = repository.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert [entry.annotations for entry in found] == [{"io.imgsnap.note": "größer"}]


def test_referrers_come_in_pages(registry, repository):
    image = push_image(repository, "v1")
    for number in range(5):
        made = artifact(repository, image, b"%d" % number)
        repository.put_manifest(made, subject=image.descriptor.digest)
    registry.switches.referrers_page = 2
    found = repository.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert len({entry.digest for entry in found}) == 5


def test_an_image_under_the_fallback_tag_refers_to_nothing(registry, repository):
    registry.switches.referrers = "404"
    subject = push_image(repository, "v1").descriptor.digest
    push_image(repository, fallback_tag(subject), b"other")
    assert repository.referrers(subject, "") == []


def test_manifests_are_put_by_digest_and_then_by_tag(registry, repository):
    manifest = push_image(repository, "a")
    start = len(registry.log)
    repository.put_manifest(manifest, ["b", "c"])
    assert [entry.path.rpartition("/")[2] for entry in registry.log[start:]] == [
        manifest.descriptor.digest,
        "b",
        "c",
    ]
    assert {e.headers["content-type"] for e in registry.log[start:]} == {media_types.OCI_MANIFEST}


def test_a_manifest_before_its_blobs_is_explained(repository, registry):
    from imgsnap.oci.manifest import ImageManifest, raw_manifest

    absent = Descriptor("a/b", descriptor_of(b"absent").digest, 6)
    with pytest.raises(InvalidArgument) as caught:
        repository.put_manifest(raw_manifest(ImageManifest(absent, ())))
    assert "push again" in caught.value.hint
