"""Opening snapshots: round trips, names, the cache, and parts that contradict each other."""

import dataclasses
import json
import logging

import pytest

from imgsnap.blockstore.materialise import materialise
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import open_snapshot
from imgsnap.blockstore.snapshot_manifest import snapshot_manifest
from imgsnap.digest import sha256_digest
from imgsnap.errors import (
    DigestMismatch,
    FormatError,
    ImgsnapError,
    IntegrityError,
    LimitExceeded,
    NotFound,
    Unavailable,
)
from imgsnap.oci import media_types
from imgsnap.oci.repository import Descriptor, Platform, RawManifest
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import build_snapshot, index_manifest, random_device

AMD64, ARM64 = Platform("linux", "amd64"), Platform("linux", "arm64")


@pytest.fixture(scope="module")
def built():
    return build_snapshot(random_device(300), metadata_blocks=3)


def test_a_cold_open_is_one_manifest_and_three_blobs(built, tmp_path):
    repository = MemoryRepository(built)
    snapshot = open_snapshot(repository, "latest", NodeCache(tmp_path))
    assert [kind for kind, *_ in repository.log] == ["manifest", "blob", "blob", "blob"]
    assert snapshot.metadata.read(snapshot.metadata_size) == built.device[: 3 * 4096]
    assert snapshot.config == built.config
    assert snapshot.manifest.image_config is not None
    snapshot.close()


def test_embedded_parts_cost_no_request_and_are_kept(tmp_path):
    built = build_snapshot(random_device(300), embedded=True)
    repository = MemoryRepository(built)
    snapshot = open_snapshot(repository, "latest", NodeCache(tmp_path), image_config=True)
    assert [kind for kind, *_ in repository.log] == ["manifest"]
    assert snapshot.config == built.config
    assert snapshot.metadata.read(snapshot.metadata_size) == built.device[: snapshot.metadata_size]
    snapshot.close()
    by_digest = MemoryRepository(built)
    open_snapshot(by_digest, built.digest, NodeCache(tmp_path), image_config=True).close()
    assert by_digest.log == []


def test_a_warm_open_asks_only_for_the_tag_and_a_digest_asks_nothing(built, tmp_path):
    open_snapshot(MemoryRepository(built), "latest", NodeCache(tmp_path)).close()
    by_tag = MemoryRepository(built)
    open_snapshot(by_tag, "latest", NodeCache(tmp_path)).close()
    assert [kind for kind, *_ in by_tag.log] == ["manifest"]
    by_digest = MemoryRepository(built)
    open_snapshot(by_digest, built.digest, NodeCache(tmp_path)).close()
    assert by_digest.log == []


def test_an_unreachable_registry_is_replaced_by_the_last_answer(built, tmp_path, caplog):
    repository = MemoryRepository(built)
    with pytest.raises(Unavailable):
        repository.faults.away = 1
        open_snapshot(repository, "latest", NodeCache(tmp_path))
    repository.faults.away = 0
    open_snapshot(repository, "latest", NodeCache(tmp_path)).close()
    repository.faults.away = 1
    with caplog.at_level(logging.WARNING):
        snapshot = open_snapshot(repository, "latest", NodeCache(tmp_path))
    assert snapshot.stale
    assert "does not answer" in caplog.text
    snapshot.close()


def test_an_image_is_followed_to_its_newest_snapshot(tmp_path):
    config = Descriptor(media_types.OCI_CONFIG, sha256_digest(b"{}"), 2)
    image_json = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": config.media_type, "digest": config.digest, "size": 2},
        "layers": [],
    }
    raw = json.dumps(image_json).encode()
    image = RawManifest(Descriptor(media_types.OCI_MANIFEST, sha256_digest(raw), len(raw)), raw)
    repository = MemoryRepository()
    repository.add_manifest(image, "app")
    with pytest.raises(NotFound, match="without a snapshot"):
        open_snapshot(repository, "app", NodeCache(tmp_path / "none"))
    newest = build_snapshot(random_device(40, 2), created="2026-02-01T00:00:00Z")
    for snapshot in (
        build_snapshot(random_device(40, 1), created="2026-01-01T00:00:00Z"),
        newest,
        build_snapshot(random_device(40, 3)),
    ):
        repository.add(snapshot, tag="", subject=image.descriptor.digest)
    opened = open_snapshot(repository, "app", NodeCache(tmp_path / "c"))
    assert opened.manifest.digest == newest.digest
    opened.close()


def test_an_index_is_searched_for_the_platform(tmp_path):
    amd64 = build_snapshot(random_device(40, 1))
    arm64 = build_snapshot(random_device(40, 2), architecture="arm64")
    repository = MemoryRepository(amd64, arm64)
    entries = [(amd64.manifest.descriptor, "amd64"), (arm64.manifest.descriptor, "arm64")]
    repository.add_manifest(index_manifest(entries), "multi")
    for platform, expected in ((AMD64, amd64), (ARM64, arm64)):
        opened = open_snapshot(repository, "multi", NodeCache(tmp_path), platform=platform)
        assert opened.manifest.digest == expected.digest
        opened.close()
    with pytest.raises(NotFound, match=r"linux/amd64, linux/arm64"):
        wanted = Platform("linux", "riscv64")
        open_snapshot(repository, "multi", NodeCache(tmp_path), platform=wanted)
    with pytest.raises(NotFound, match="for linux/arm64, not for linux/amd64"):
        open_snapshot(repository, arm64.digest, NodeCache(tmp_path), platform=AMD64)


def test_damaged_cache_files_are_fetched_again(built, tmp_path):
    cache = NodeCache(tmp_path)
    open_snapshot(MemoryRepository(built), "latest", cache).close()
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "extents"):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    repository = MemoryRepository(built)
    snapshot = open_snapshot(repository, "latest", cache)
    assert repository.count("blob") == 3
    assert snapshot.metadata.read(snapshot.metadata_size) == built.device[: 3 * 4096]
    snapshot.close()


def test_a_damaged_blob_is_refused_and_not_kept(built, tmp_path):
    repository = MemoryRepository(built)
    repository.faults.corrupt = 1
    with pytest.raises(IntegrityError):
        open_snapshot(repository, "latest", NodeCache(tmp_path))
    repository.faults.corrupt = 0
    open_snapshot(repository, "latest", NodeCache(tmp_path)).close()


def swapped(built, other, *names):
    """`built`'s manifest with some of the layers, or the config, of `other`."""
    mine, theirs = (json.loads(b.manifest.raw) for b in (built, other))
    for name in names:
        if name == "config":
            mine["config"] = theirs["config"]
            continue
        layers = [
            next(t for t in theirs["layers"] if t["mediaType"] == name)
            if layer["mediaType"] == name
            else layer
            for layer in mine["layers"]
        ]
        mine["layers"] = layers
    raw = json.dumps(mine).encode()
    return RawManifest(Descriptor(media_types.OCI_MANIFEST, sha256_digest(raw), len(raw)), raw)


@pytest.mark.parametrize(
    "names",
    [
        ("config",),
        (media_types.EROFS_METADATA,),
        (media_types.CHUNK_MAP,),
        (media_types.EROFS_METADATA, media_types.CHUNK_MAP),
    ],
)
def test_parts_of_different_snapshots_are_refused(built, tmp_path, names):
    other = build_snapshot(random_device(300, seed=8), metadata_blocks=3)
    repository = MemoryRepository(built, other)
    repository.add_manifest(swapped(built, other, *names), "mixed")
    with pytest.raises(IntegrityError):
        open_snapshot(repository, "mixed", NodeCache(tmp_path))


def test_a_pack_that_the_manifest_does_not_list_is_refused(built, tmp_path):
    value = json.loads(built.manifest.raw)
    value["layers"] = [x for x in value["layers"] if x["digest"] != built.packs[1]]
    raw = json.dumps(value).encode()
    descriptor = dataclasses.replace(built.manifest.descriptor, digest=sha256_digest(raw))
    repository = MemoryRepository(built)
    repository.add_manifest(RawManifest(descriptor, raw), "short")
    with pytest.raises(FormatError, match="is not listed"):
        open_snapshot(repository, "short", NodeCache(tmp_path))


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{}", b'{"schemaVersion":2,"config":1,"layers":[]}', b"\xff", b"[" * 100_000],
)
def test_hostile_manifests_are_format_errors(raw):
    descriptor = Descriptor(media_types.OCI_MANIFEST, sha256_digest(raw), len(raw))
    with pytest.raises(ImgsnapError) as caught:
        snapshot_manifest(RawManifest(descriptor, raw))
    assert isinstance(caught.value, FormatError | LimitExceeded) or caught.value.exit_code == 8


def test_a_block_root_that_is_not_that_of_the_chunks(tmp_path) -> None:
    """`check` finds it; a boot pack would otherwise bring other bytes than the chunks."""
    good = build_snapshot(random_device(60), extents=1)
    with open_store(MemoryRepository(good), tmp_path / "a") as store:
        materialise(store.snapshot, tmp_path / "device")
        assert (tmp_path / "device").read_bytes() == good.device
        extent = dataclasses.replace(store.snapshot.chunk_map.extents[0], block_root=bytes(32))
        forged = dataclasses.replace(store.snapshot.chunk_map, extents=(extent,))
        with pytest.raises(DigestMismatch, match="block root"):
            materialise(dataclasses.replace(store.snapshot, chunk_map=forged), tmp_path / "other")


def test_manifest_and_config_must_state_one_root_hash(tmp_path):
    sealed = build_snapshot(random_device(300), verity=True)
    plain = build_snapshot(random_device(300))
    stated = json.loads(sealed.manifest.raw)["annotations"]
    for built, annotations in (
        (sealed, None),
        (sealed, {"io.imgsnap.verity.roothash": "00" * 32}),
        (sealed, {"io.imgsnap.verity.roothash": "0"}),
        (plain, stated),
    ):
        value = json.loads(built.manifest.raw)
        value["annotations"] = annotations or {}
        raw = json.dumps(value).encode()
        descriptor = dataclasses.replace(
            built.manifest.descriptor, digest=sha256_digest(raw), size=len(raw)
        )
        other = dataclasses.replace(built, manifest=RawManifest(descriptor, raw))
        with pytest.raises(IntegrityError, match=r"root hash|roothash"):
            open_snapshot(MemoryRepository(other), "latest", NodeCache(tmp_path))
    open_snapshot(MemoryRepository(sealed), "latest", NodeCache(tmp_path)).close()
