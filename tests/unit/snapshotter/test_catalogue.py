"""The catalogue survives restarts, crashes and damage, and believes nothing that is not its own."""

import json
import os
from pathlib import Path

import pytest

from imgsnap.digest import Digest, chain_ids
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.negative_cache import NegativeCache
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot

REPOSITORY = "registry.test:5000/team/app"


def digest(number: int) -> Digest:
    return Digest(f"sha256:{number:064x}")


def snapshot(layers: int = 3, repository: str = REPOSITORY, number: int = 7) -> ImageSnapshot:
    diff_ids = [digest(100 + n) for n in range(layers)]
    return ImageSnapshot(
        repository,
        digest(number),
        tuple(
            ImageLayer(diff_id, digest(200 + n), n, "a/b", chain_id)
            for n, (diff_id, chain_id) in enumerate(zip(diff_ids, chain_ids(diff_ids), strict=True))
        ),
    )


def test_what_is_stored_is_loaded_by_another_process(tmp_path: Path):
    Catalogue(tmp_path).store(REPOSITORY, digest(1), snapshot())
    other = Catalogue(tmp_path)
    assert other.load(REPOSITORY, digest(1)) == snapshot()
    assert other.place_of(digest(7)) == REPOSITORY
    assert other.load(REPOSITORY, digest(2)) is None
    assert (
        other.load("registry.test/other", digest(1)) is None and other.place_of(digest(1)) is None
    )
    other.store(REPOSITORY, digest(1), snapshot(500))
    assert Catalogue(tmp_path).load(REPOSITORY, digest(1)) == snapshot(500)
    other.forget(REPOSITORY, digest(1))
    other.forget(REPOSITORY, digest(1))
    assert other.load(REPOSITORY, digest(1)) is None


def test_the_oldest_go(tmp_path: Path):
    catalogue = Catalogue(tmp_path, entries_max=3)
    for number in range(5):
        catalogue.store(REPOSITORY, digest(number), snapshot(number=number))
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.stat().st_mtime > 1000:
                os.utime(path, (number, number))
    found = [catalogue.load(REPOSITORY, digest(number)) is not None for number in range(5)]
    assert found == [False, False, True, True, True]
    assert len(list((tmp_path / "places").iterdir())) == 3


def entry(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "images").iterdir()
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: value.update(version=2),
        lambda value: value.update(manifest=digest(9)),
        lambda value: value.update(repository="registry.test/evil"),
        lambda value: value.update(layers=[]),
        lambda value: value.update(layers=value["layers"] * 200),
        lambda value: value.update(layers=[1]),
        lambda value: value.update(snapshot=None),
        lambda value: value["snapshot"].update(repository="oci:/etc"),
        lambda value: value["snapshot"].update(digest="sha256:../../x"),
        lambda value: value["layers"][0].update(diffID="x"),
        lambda value: value["layers"][0].update(digest=None),
        lambda value: value["layers"][0].update(size=-1),
        lambda value: value["layers"][0].update(size=True),
        lambda value: value["layers"][0].update(type="a" * 256),
    ],
)
def test_damage_is_absence(tmp_path: Path, damage, caplog):
    catalogue = Catalogue(tmp_path)
    catalogue.store(REPOSITORY, digest(1), snapshot())
    value = json.loads(entry(tmp_path).read_bytes())
    damage(value)
    entry(tmp_path).write_text(json.dumps(value))
    assert catalogue.load(REPOSITORY, digest(1)) is None
    assert "damaged" in caplog.text and not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\0" * 9, b'{"a":' * 9000, b" " * (2 << 20)])
def test_what_is_no_json_is_absence(tmp_path: Path, raw: bytes):
    catalogue = Catalogue(tmp_path)
    catalogue.store(REPOSITORY, digest(1), snapshot())
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(raw)
    assert catalogue.load(REPOSITORY, digest(1)) is None and catalogue.place_of(digest(7)) is None


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch):
    catalogue = Catalogue(tmp_path)
    catalogue.store(REPOSITORY, digest(1), snapshot())

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        catalogue.store(REPOSITORY, digest(1), snapshot(2))
    monkeypatch.undo()
    assert catalogue.load(REPOSITORY, digest(1)) == snapshot()
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_negative_answers_are_bounded_in_number_and_time():
    now = 0.0
    cache = NegativeCache(3, clock=lambda: now)
    for key in "abc":
        cache.add(key, 10)
    assert "a" in cache
    cache.add("d", 5)
    assert "b" not in cache and "a" in cache and len(cache) == 3
    now = 5.0
    assert "d" not in cache and "a" in cache
    cache.forget("a")
    cache.forget("a")
    assert "a" not in cache and "c" in cache
    now = 10.0
    assert "c" not in cache and len(cache) == 0
