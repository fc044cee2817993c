"""Image layouts on disk: storing, naming, referrers, hostile content, crashes, sharing."""

import errno
import json
import multiprocessing
import os
import threading

import pytest

from imgsnap.digest import digest_hex, sha256_digest
from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    FormatError,
    IntegrityError,
    InvalidArgument,
    InvalidReference,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
    UnsupportedFormat,
)
from imgsnap.oci import media_types
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.layout_files import LayoutFiles, copy_all
from imgsnap.oci.manifest import ImageIndex, raw_manifest
from imgsnap.oci.registry_referrers import fallback_tag
from tests.support.oci_images import artifact, descriptor_of, push_image


@pytest.fixture
def layout(tmp_path):
    repository = LayoutRepository(tmp_path / "layout", create=True)
    yield repository
    repository.close()


def index_of(layout):
    return json.loads((layout.path / "index.json").read_bytes())["manifests"]


def blob_path(layout, digest):
    return layout.path / "blobs" / "sha256" / digest_hex(digest)


# Blobs


def test_blobs_are_stored_and_read(layout, tmp_path):
    data = bytes(range(256)) * 1000
    descriptor = descriptor_of(data)
    assert not layout.has_blob(descriptor)
    path = tmp_path / "file"
    path.write_bytes(data)
    layout.put_blob(descriptor, path)
    path.unlink()
    assert layout.has_blob(descriptor)
    assert layout.blob(descriptor, size_max=1 << 20) == data
    assert layout.read_range(descriptor, 1000, 300) == data[1000:1300]
    assert layout.read_range(descriptor, len(data), 0) == b""
    with layout.open_blob(descriptor) as stream:
        assert b"".join(iter(lambda: stream.read(999), b"")) == data
    assert sorted(os.listdir(layout.path / "blobs/sha256")) == [digest_hex(descriptor.digest)]


def test_blob_refusals(layout, tmp_path):
    descriptor = descriptor_of(b"data")
    path = tmp_path / "file"
    path.write_bytes(b"other size")
    with pytest.raises(InvalidArgument):
        layout.put_blob(descriptor, path)
    with pytest.raises(NotFound):
        layout.put_blob(descriptor, tmp_path / "none")
    with pytest.raises(DigestMismatch):
        layout.put_bytes(descriptor, b"dat0")
    with pytest.raises(NotFound):
        layout.blob(descriptor, size_max=99)
    layout.put_bytes(descriptor, b"data")
    with pytest.raises(LimitExceeded):
        layout.blob(descriptor, size_max=3)
    for offset, length in ((-1, 1), (0, 5), (4, 1), (0, -1)):
        with pytest.raises(InvalidArgument):
            layout.read_range(descriptor, offset, length)


def test_damaged_blobs_are_noticed(layout):
    descriptor = descriptor_of(b"data")
    layout.put_bytes(descriptor, b"data")
    path = blob_path(layout, descriptor.digest)
    path.write_bytes(b"dat0")
    with pytest.raises(DigestMismatch):
        layout.blob(descriptor, size_max=99)
    unverified = LayoutRepository(layout.path, verify=False)
    assert unverified.blob(descriptor, size_max=99) == b"dat0"
    unverified.close()
    path.write_bytes(b"da")
    assert not layout.has_blob(descriptor)
    with pytest.raises(IntegrityError):
        layout.read_range(descriptor, 0, 4)
    layout.put_bytes(descriptor, b"data")  # a torn blob is replaced
    assert layout.blob(descriptor, size_max=99) == b"data"


def test_files_reached_through_a_link_are_copied(layout, tmp_path):
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"data")
    link.symlink_to(path)
    descriptor = descriptor_of(b"data")
    layout.put_blob(descriptor, link)
    assert not blob_path(layout, descriptor.digest).is_symlink()
    assert layout.blob(descriptor, size_max=9) == b"data"


def test_copies_where_links_are_impossible(layout, tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "copy_file_range", refuse)
    data = os.urandom(100_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    descriptor = descriptor_of(data)
    layout.put_blob(descriptor, path)
    assert layout.blob(descriptor, size_max=1 << 20) == data
    other = LayoutRepository(tmp_path / "other", create=True)
    assert other.mount_blob(descriptor, layout)
    assert other.blob(descriptor, size_max=1 << 20) == data
    assert blob_path(other, descriptor.digest).stat().st_nlink == 1
    other.close()


def test_a_full_disk_is_said_and_leaves_nothing(layout):
    files = LayoutFiles(layout.path)
    with (
        open("/dev/full", "wb", buffering=0) as full,
        pytest.raises(ResourceExhausted) as caught,
    ):
        files.write(sha256_digest(b"x"), 1, lambda fd: os.write(full.fileno(), b"x"))
    assert "free space" in caught.value.hint
    assert caught.value.exit_code == 9
    assert os.listdir(layout.path / "blobs/sha256") == []
    files.close()


def test_a_short_source_is_not_published(layout, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    files = LayoutFiles(layout.path)
    with path.open("rb") as source, pytest.raises(IntegrityError):
        files.write(sha256_digest(b"abcd"), 4, lambda fd: copy_all(source.fileno(), fd))
    assert os.listdir(layout.path / "blobs/sha256") == []
    files.close()


def test_old_temporary_files_are_removed(layout):
    directory = layout.path / "blobs/sha256"
    old, new = directory / ".tmp-old", directory / ".tmp-new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (1, 1))
    LayoutRepository(layout.path, create=True).close()
    assert os.listdir(directory) == [".tmp-new"]


def test_blobs_are_linked_between_layouts(layout, tmp_path):
    other = LayoutRepository(tmp_path / "other", create=True)
    descriptor = descriptor_of(b"shared")
    assert not other.mount_blob(descriptor, layout)
    layout.put_bytes(descriptor, b"shared")
    assert other.mount_blob(descriptor, layout)
    assert other.mount_blob(descriptor, layout)
    assert blob_path(other, descriptor.digest).stat().st_nlink == 2
    damaged = descriptor_of(b"good!!")
    blob_path(layout, damaged.digest).write_bytes(b"bad!!!")
    with pytest.raises(DigestMismatch):
        other.mount_blob(damaged, layout)
    assert not other.has_blob(damaged)
    other.close()


# Manifests and names


def test_names_move_and_manifests_stay_listed(layout):
    first, second = push_image(layout, "latest"), push_image(layout, "v2", b"two")
    assert layout.manifest("latest") == first
    assert layout.tags() == ["latest", "v2"]
    layout.put_manifest(second, ["latest", "latest", "reg.example/x:1"])
    assert layout.manifest("latest") == second
    assert layout.tags() == ["latest", "reg.example/x:1", "v2"]
    assert layout.tags("v") == ["v2"]
    entries = index_of(layout)
    assert [entry["digest"] for entry in entries].count(first.descriptor.digest) == 1
    assert next(entry for entry in entries if "annotations" not in entry)["digest"] == (
        first.descriptor.digest
    )
    assert layout.manifest(first.descriptor.digest) == first
    layout.put_manifest(first, ["back"])
    assert len(index_of(layout)) == 4
    assert layout.remove_tag("back")
    assert not layout.remove_tag("back")
    with pytest.raises(NotFound) as caught:
        layout.manifest("back")
    assert "v2" in caught.value.hint


def test_an_unchanged_index_is_not_written(layout):
    manifest = push_image(layout, "v1")
    before = (layout.path / "index.json").stat()
    layout.put_manifest(manifest, ["v1"])
    assert (layout.path / "index.json").stat().st_ino == before.st_ino


@pytest.mark.parametrize("tag", ["", "a b", "-x", "x/", "a@b", "x" * 600])
def test_names_are_checked(layout, tag):
    manifest = push_image(layout, "v1")
    with pytest.raises(InvalidReference):
        layout.put_manifest(manifest, [tag])


def test_entries_of_other_tools_survive(layout):
    path = layout.path / "index.json"
    value = json.loads(path.read_bytes())
    foreign = {
        "mediaType": media_types.OCI_MANIFEST,
        "digest": "sha256:" + "1" * 64,
        "size": 5,
        "data": "eA==",
        "annotations": {media_types.REF_NAME: "theirs", "k": "v"},
    }
    path.write_text(json.dumps(value | {"manifests": [foreign], "future": 1}))
    push_image(layout, "ours")
    stored = json.loads(path.read_bytes())
    assert stored["manifests"][0] == foreign
    assert stored["future"] == 1
    layout.remove_tag("theirs")
    assert json.loads(path.read_bytes())["manifests"][-1] == foreign | {"annotations": {"k": "v"}}


def test_what_a_layout_without_a_name_means(layout):
    with pytest.raises(NotFound):
        layout.default_reference()
    first = push_image(layout, "v1")
    assert layout.default_reference() == first.descriptor.digest
    layout.put_manifest(artifact(layout, first), ["snapshot"])
    assert layout.default_reference() == first.descriptor.digest
    push_image(layout, "v2", b"two")
    with pytest.raises(InvalidReference) as caught:
        layout.default_reference()
    assert "v1, v2" in caught.value.hint
    push_image(layout, "latest", b"three")
    assert layout.default_reference() == "latest"


def test_the_named_index_is_meant_and_not_its_parts(layout):
    parts = []
    for text in (b"1", b"2"):
        parts.append(push_image(layout, "x", text).descriptor)
    layout.remove_tag("x")
    whole = raw_manifest(ImageIndex(tuple(parts)))
    layout.put_manifest(whole, ["app"])
    assert layout.default_reference() == whole.descriptor.digest


def test_an_unnamed_image_that_is_alone_is_latest(layout):
    manifest = push_image(layout, "x")
    layout.remove_tag("x")
    assert layout.manifest("latest") == manifest


# Referrers


def test_referrers_with_and_without_names(layout):
    image = push_image(layout, "v1")
    subject = image.descriptor.digest
    named, nameless = artifact(layout, image), artifact(layout, image, b"2")
    layout.put_manifest(named, ["snap"])
    layout.put_manifest(nameless, subject=subject)
    for _ in range(2):  # the second time from the cache
        found = layout.referrers(subject, media_types.ARTIFACT_SNAPSHOT)
        assert {entry.digest for entry in found} == {
            named.descriptor.digest,
            nameless.descriptor.digest,
        }
    assert found[0].annotations == {"io.imgsnap.note": "größer"}
    assert layout.referrers(subject, "other/type") == []
    assert len(layout.referrers(subject, "")) == 2
    assert layout.referrers(named.descriptor.digest, "") == []


def test_referrers_of_a_fallback_tag_copied_from_a_registry(layout):
    image = push_image(layout, "v1")
    made = artifact(layout, image)
    layout.put_bytes(made.descriptor, made.raw)
    index = raw_manifest(ImageIndex((made.descriptor,)))
    layout.put_manifest(index, [fallback_tag(image.descriptor.digest)])
    found = layout.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert [entry.digest for entry in found] == [made.descriptor.digest]


def test_a_damaged_manifest_hides_no_other_referrer(layout, caplog):
    image = push_image(layout, "v1")
    made = artifact(layout, image)
    layout.put_manifest(made)
    bad = push_image(layout, "bad", b"bad")
    blob_path(layout, bad.descriptor.digest).write_bytes(b"{}")
    assert len(layout.referrers(image.descriptor.digest, "")) == 1
    assert bad.descriptor.digest in caplog.text
    with pytest.raises(DigestMismatch):
        layout.manifest("bad")


# Hostile and broken layouts


def test_what_is_no_layout(tmp_path):
    with pytest.raises(NotFound):
        LayoutRepository(tmp_path / "none")
    with pytest.raises(NotFound):
        LayoutRepository(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidArgument):
        LayoutRepository(tmp_path, create=True)
    assert sorted(os.listdir(tmp_path)) == ["file"]
    with pytest.raises((IntegrityError, InvalidArgument)):
        LayoutRepository(tmp_path / "file")


def test_the_converters_directory_may_be_there_first(tmp_path):
    (tmp_path / "imgsnap" / "chunk-index").mkdir(parents=True)
    LayoutRepository(tmp_path, create=True).close()
    LayoutRepository(tmp_path, create=True).close()


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("oci-layout", '{"imageLayoutVersion":"9.0.0"}', UnsupportedFormat),
        ("oci-layout", "nonsense", FormatError),
        ("index.json", "nonsense", FormatError),
        ("index.json", '{"schemaVersion":2}', FormatError),
    ],
)
def test_broken_records(layout, name, text, kind):
    (layout.path / name).write_text(text)
    with pytest.raises(kind):
        LayoutRepository(layout.path).tags()


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "blobs", "blobs/sha256"])
def test_symbolic_links_do_not_lead_out(layout, tmp_path, name):
    push_image(layout, "v1")
    place, outside = layout.path / name, tmp_path / "outside"
    place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(IntegrityError):
        LayoutRepository(layout.path).manifest("v1")


def test_blobs_must_be_regular_files(layout, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"data")
    descriptor = descriptor_of(b"data")
    path = blob_path(layout, descriptor.digest)
    path.symlink_to(secret)
    with pytest.raises(IntegrityError, match="symbolic link"):
        layout.has_blob(descriptor)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(IntegrityError):
        layout.blob(descriptor, size_max=9)
    path.unlink()
    path.mkdir()
    with pytest.raises(IntegrityError):
        layout.read_range(descriptor, 0, 1)


@pytest.mark.parametrize("digest", ["sha256:../../../etc/passwd", "../x", "sha256:" + "A" * 64])
def test_digests_are_checked_before_they_become_paths(layout, digest):
    descriptor = type(descriptor_of(b""))("a/b", digest, 1)
    for call in (
        lambda: layout.blob(descriptor, size_max=9),
        lambda: layout.read_range(descriptor, 0, 1),
        lambda: layout.has_blob(descriptor),
    ):
        with pytest.raises(InvalidArgument):
            call()
    with pytest.raises((InvalidArgument, NotFound)):
        layout.manifest(digest)


def test_a_manifest_that_is_too_large(layout):
    data = b" " * (5 << 20)
    layout.put_bytes(descriptor_of(data), data)
    with pytest.raises(LimitExceeded):
        layout.manifest(descriptor_of(data).digest)


# Concurrency


def _push_many(path, worker):
    repository = LayoutRepository(path, create=True)
    for number in range(5):
        push_image(repository, f"w{worker}-{number}", b"%d %d" % (worker, number))
    repository.close()


def test_threads_lose_no_name(tmp_path):
    path = tmp_path / "layout"
    threads = [threading.Thread(target=_push_many, args=(path, n)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(LayoutRepository(path).tags()) == 20


def test_processes_lose_no_name(tmp_path):
    path = tmp_path / "layout"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_push_many, args=(path, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    repository = LayoutRepository(path)
    assert len(repository.tags()) == 15
    assert all(repository.manifest(tag) for tag in repository.tags())
    repository.close()


def test_archives_cannot_be_written(tmp_path):
    from imgsnap.oci.locate import RegistryOptions, open_repository
    from imgsnap.oci.reference import parse_location

    with pytest.raises(InvalidArgument):
        open_repository(
            parse_location(f"oci-archive:{tmp_path}/x.tar"),
            RegistryOptions(),
            store=tmp_path,
            environ={},
            create=True,
        )


def test_errors_of_the_system_are_translated(tmp_path):
    from imgsnap.oci.layout_files import translated

    for number, kind in (
        (errno.EDQUOT, ResourceExhausted),
        (errno.EROFS, AccessDenied),
        (errno.EACCES, AccessDenied),
        (errno.ENOENT, NotFound),
    ):
        with pytest.raises(kind), translated(tmp_path, "x"):
            raise OSError(number, "y")
