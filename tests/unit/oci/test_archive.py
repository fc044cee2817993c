"""Repositories inside tar files, and the tar index under them."""

import gzip
import io
import json
import os
import random
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.digest import sha256_digest
from imgsnap.errors import (
    DigestMismatch,
    FormatError,
    ImgsnapError,
    InvalidReference,
    LimitExceeded,
    NotFound,
    Unsupported,
)
from imgsnap.oci import archive, media_types, tar_index
from imgsnap.oci.archive import DockerArchiveRepository, OciArchiveRepository
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.locate import RegistryOptions, open_repository, parse_headers, reference_of
from imgsnap.oci.manifest import parse_manifest
from imgsnap.oci.reference import parse_location
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.tar_index import read_tar_index
from tests.support.oci_images import artifact, descriptor_of, push_image, tar_of

LAYERS = [tar_of({"a": b"1"}), tar_of({"b": b"2" * 2000})]


@pytest.fixture
def oci_tar(tmp_path):
    layout = LayoutRepository(tmp_path / "layout", create=True)
    image = push_image(layout, "v1")
    layout.put_manifest(artifact(layout, image))
    layout.close()
    path = tmp_path / "image.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "layout", arcname=".")
    return path, image


def docker_files(layers=LAYERS, tags=("app:1", "docker.io/me/x:2"), **config):
    value = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [sha256_digest(layer) for layer in layers]},
    } | config
    raw = json.dumps(value).encode()
    files = {f"{number}/layer.tar": layer for number, layer in enumerate(layers)}
    files["config.json"] = raw
    entry = {"Config": "config.json", "RepoTags": list(tags), "Layers": list(files)[:-1]}
    return entry, files


def docker_tar(path, *images):
    files, entries = {}, []
    for number, (entry, contents) in enumerate(images):
        files.update({f"{number}/{name}": data for name, data in contents.items()})
        entries.append(
            entry
            | {"Config": f"{number}/{entry['Config']}"}
            | {"Layers": [f"{number}/{name}" for name in entry["Layers"]]}
        )
    files["manifest.json"] = json.dumps(entries).encode()
    path.write_bytes(tar_of(files))
    return path


# oci-archive


def test_reads_a_layout_in_a_tar(oci_tar):
    path, image = oci_tar
    repository = OciArchiveRepository(path)
    assert repository.tags() == ["v1"]
    assert repository.manifest("v1") == image
    layer = parse_manifest(image.raw).layers[0]
    whole = repository.blob(layer, size_max=1 << 20)
    assert sha256_digest(whole) == layer.digest
    assert repository.read_range(layer, 512, 5) == whole[512:517]
    with repository.open_blob(layer) as stream:
        assert stream.read(1 << 20) == whole
    assert repository.has_blob(layer)
    assert not repository.has_blob(descriptor_of(b"absent"))
    found = repository.referrers(image.descriptor.digest, media_types.ARTIFACT_SNAPSHOT)
    assert len(found) == 1
    assert repository.default_reference() == image.descriptor.digest
    repository.close()
    repository.close()


@pytest.mark.parametrize("kind", [OciArchiveRepository, DockerArchiveRepository])
def test_what_is_no_archive(tmp_path, kind):
    path = tmp_path / "x.tar"
    with pytest.raises(NotFound):
        kind(path)
    path.write_bytes(gzip.compress(tar_of({"a": b""})))
    with pytest.raises(Unsupported) as caught:
        kind(path)
    assert "gunzip" in caught.value.hint
    path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    with pytest.raises(Unsupported, match="zstd"):
        kind(path)
    path.write_bytes(b"nonsense" * 100)
    with pytest.raises(FormatError):
        kind(path)
    path.write_bytes(tar_of({"a": b""}))
    with pytest.raises(NotFound):
        kind(path)
    path.write_bytes(b"")
    with pytest.raises(NotFound):
        kind(path)


def test_a_damaged_blob_in_a_tar(oci_tar):
    path, image = oci_tar
    data = bytearray(path.read_bytes())
    at = data.index(image.raw)
    data[at + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises((DigestMismatch, FormatError)):
        OciArchiveRepository(path).manifest("v1")


# docker-archive


def test_reads_docker_save(tmp_path):
    repository = DockerArchiveRepository(docker_tar(tmp_path / "d.tar", docker_files()))
    manifest = parse_manifest(repository.manifest("app:1").raw)
    assert [layer.digest for layer in manifest.layers] == [sha256_digest(raw) for raw in LAYERS]
    assert {layer.media_type for layer in manifest.layers} == {media_types.OCI_LAYER_TAR}
    assert manifest.config.media_type == media_types.OCI_CONFIG
    config = json.loads(repository.blob(manifest.config, size_max=1 << 20))
    assert config["os"] == "linux"
    for layer, raw in zip(manifest.layers, LAYERS, strict=True):
        assert repository.blob(layer, size_max=1 << 20) == raw
    for name in ("docker.io/library/app:1", "me/x:2", "docker.io/me/x:2"):
        assert repository.manifest(name) == repository.manifest("app:1")
    with pytest.raises(InvalidReference, match=r"app:1, docker\.io/me/x:2"):
        repository.manifest("other:1")
    repository.close()


def test_several_images_need_a_name(tmp_path):
    path = docker_tar(
        tmp_path / "d.tar", docker_files(tags=["a:1"]), docker_files(LAYERS[:1], tags=["b:1"])
    )
    with pytest.raises(InvalidReference) as caught:
        reference_of(parse_location(f"docker-archive:{path}"))
    assert "a:1, b:1" in caught.value.hint
    repository, reference = opened(f"docker-archive:{path}:b:1", tmp_path)
    assert len(parse_manifest(repository.manifest(reference).raw).layers) == 1
    repository.close()


def test_images_without_a_name(tmp_path):
    path = docker_tar(tmp_path / "d.tar", docker_files(tags=()))
    repository, reference = opened(f"docker-archive:{path}", tmp_path)
    assert parse_manifest(repository.manifest(reference).raw)
    repository.close()


def test_compressed_layers_are_refused_with_a_way_out(tmp_path):
    layer = gzip.compress(LAYERS[0])
    with pytest.raises(Unsupported, match="gzip") as caught:
        DockerArchiveRepository(docker_tar(tmp_path / "d.tar", docker_files([layer])))
    assert "skopeo copy" in caught.value.hint


def test_layers_may_be_links(tmp_path):
    entry, files = docker_files()
    entry["Layers"].append("2/layer.tar")
    config = json.loads(files["config.json"])
    config["rootfs"]["diff_ids"].append(sha256_digest(LAYERS[0]))
    files["config.json"] = json.dumps(config).encode()
    files["manifest.json"] = json.dumps([entry]).encode()
    buffer = io.BytesIO(tar_of(files))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("2/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        tar.addfile(link)
    path = tmp_path / "d.tar"
    path.write_bytes(buffer.getvalue())
    repository = DockerArchiveRepository(path)
    layers = parse_manifest(repository.manifest("app:1").raw).layers
    assert layers[2].digest == layers[0].digest
    repository.close()


@pytest.mark.parametrize(
    "change",
    [
        {"Config": 5},
        {"Config": None},
        {"Layers": ["../../etc/passwd"]},
        {"Layers": ["0/layer.tar"]},
        {"Layers": "x"},
        {"RepoTags": [1]},
        {"RepoTags": {}},
        {"Layers": [["x"]]},
    ],
)
def test_malformed_manifests_of_docker_save(tmp_path, change):
    entry, files = docker_files()
    files["manifest.json"] = json.dumps([entry | change]).encode()
    path = tmp_path / "d.tar"
    path.write_bytes(tar_of(files))
    if change == {"RepoTags": {}}:
        assert DockerArchiveRepository(path).tags() == []
        return
    with pytest.raises(FormatError):
        DockerArchiveRepository(path)


@pytest.mark.parametrize(
    "config",
    [{"rootfs": None}, {"rootfs": {"diff_ids": ["x", "y"]}}, {"rootfs": {"diff_ids": [1, 2]}}],
)
def test_malformed_configs(tmp_path, config):
    with pytest.raises(FormatError):
        DockerArchiveRepository(docker_tar(tmp_path / "d.tar", docker_files(**config)))


@pytest.mark.parametrize("raw", [b"{}", b"[1]", b"null", b'[],"x":1', b"", b"[" * 9999])
def test_manifest_json_must_be_a_list_of_objects(tmp_path, raw):
    path = tmp_path / "d.tar"
    path.write_bytes(tar_of({"manifest.json": raw}))
    with pytest.raises(FormatError):
        DockerArchiveRepository(path)


def test_too_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "IMAGES_MAX", 1)
    with pytest.raises(LimitExceeded):
        DockerArchiveRepository(docker_tar(tmp_path / "d.tar", docker_files(), docker_files()))


# The tar index


def index_bytes(tmp_path, data):
    path = tmp_path / "t.tar"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_tar_index(fd, path)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_forms_of_tar(tmp_path, form):
    buffer = io.BytesIO()
    names = ["short", "d" * 90 + "/" + "e" * 60, "./dot/../up"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 300, "ü" * 80 + "/file"]
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = number + 600
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes([65 + number]) * info.size))
        directory = tarfile.TarInfo("dir")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    data = buffer.getvalue()
    index = index_bytes(tmp_path, data)
    assert len(index) == len(names)
    for number, name in enumerate(names):
        member = index.find("up" if name == "./dot/../up" else name)
        assert data[member.offset : member.offset + member.size] == (
            bytes([65 + number]) * (number + 600)
        )


def test_names_that_lead_out_and_endless_links(tmp_path):
    buffer = io.BytesIO(tar_of({"../../etc/passwd": b"x", "/abs": b"y"}))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        for name, target in (("a", "b"), ("b", "a"), ("out", "../../etc/passwd")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
    index = index_bytes(tmp_path, buffer.getvalue())
    assert index.find("../../etc/passwd") is None
    assert index.find("etc/passwd") is None
    assert index.find("abs").size == 1
    assert index.find("out") is None
    with pytest.raises(FormatError):
        index.find("a")


def test_sizes_past_the_end_and_too_many_members(tmp_path, monkeypatch):
    data = tar_of({"a": b"x" * 1000, "b": b"y"})
    with pytest.raises(FormatError):
        index_bytes(tmp_path, data[:1024])
    monkeypatch.setattr(tar_index, "MEMBERS_MAX", 1)
    with pytest.raises(LimitExceeded):
        index_bytes(tmp_path, data)


def test_a_long_name_record_is_bounded(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n" * (2 << 20)))
    with pytest.raises(LimitExceeded):
        index_bytes(tmp_path, buffer.getvalue())


@given(st.randoms(use_true_random=False), st.integers(1, 4))
def test_mutated_tars_raise_only_our_errors(tmp_path_factory, rng: random.Random, count):
    entry, files = docker_files()
    files["manifest.json"] = json.dumps([entry]).encode()
    data = bytearray(tar_of(files))
    for _ in range(count):
        data[rng.randrange(len(data) - 8000)] = rng.choice([0, 0x30, 0x37, 0x80, 0xFF, 0x2F])
    path = tmp_path_factory.getbasetemp() / "mutated.tar"
    path.write_bytes(data)
    try:
        repository = DockerArchiveRepository(path)
        repository.tags()
        repository.close()
    except ImgsnapError:
        pass


# Opening by location


def opened(text, tmp_path, *, create=False, options=None):
    return open_repository(
        parse_location(text),
        options or RegistryOptions(),
        store=tmp_path / "store",
        environ={},
        create=create,
    )


def test_opens_every_kind(tmp_path, oci_tar):
    path, image = oci_tar
    repository, reference = opened("store:app", tmp_path, create=True)
    assert isinstance(repository, LayoutRepository)
    assert reference == "app:latest"
    push_image(repository, reference)
    repository.close()
    repository, reference = opened("store:app", tmp_path)
    assert repository.manifest(reference) == image
    repository.close()
    repository, reference = opened("reg.example/x:1", tmp_path)
    assert isinstance(repository, RegistryRepository)
    assert (repository.name, reference) == ("reg.example/x", "1")
    repository.close()
    repository, reference = opened(f"oci:{tmp_path}/new", tmp_path, create=True)
    assert reference == "latest"
    repository.close()
    digest = image.descriptor.digest
    for text, expected in (
        (f"oci-archive:{path}", digest),
        (f"oci-archive:{path}:v1", "v1"),
        (f"oci:{tmp_path}/layout", digest),
        (f"oci:{tmp_path}/layout:v1", "v1"),
        (f"oci:{tmp_path}/layout@{digest}", digest),
    ):
        repository, reference = opened(text, tmp_path)
        assert reference == expected == reference_of(parse_location(text))
        assert repository.manifest(reference) == image
        repository.close()
    assert reference_of(parse_location("reg.example/x")) == "latest"


def test_what_is_not_there(tmp_path):
    for text in ("store:app", f"oci:{tmp_path}/none", f"oci-archive:{tmp_path}/none.tar"):
        with pytest.raises(NotFound):
            opened(text, tmp_path)


def test_headers_of_the_command_line():
    assert parse_headers(["X-A: b:c", "Y:"]) == (("X-A", "b:c"), ("Y", ""))
    for text in ("X", ": v", ""):
        with pytest.raises(ImgsnapError):
            parse_headers([text])
