"""Which of a snapshot's boot packs is taken."""

from dataclasses import replace

import pytest

from imgsnap.blockstore.boot_choice import (
    AUTO,
    SIZE,
    BootPack,
    boot_packs,
    check_name,
    choose,
    name_of_command,
)
from imgsnap.errors import InvalidArgument
from tests.support.boot import attach_pack
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import BuiltSnapshot, build_snapshot, random_device


@pytest.fixture(scope="module")
def snapshot() -> BuiltSnapshot:
    return build_snapshot(random_device(40))


def names(repository: MemoryRepository, snapshot: BuiltSnapshot) -> list[str]:
    return [pack.name for pack in boot_packs(repository, snapshot.digest)]


def test_the_newest_of_a_name_counts(snapshot: BuiltSnapshot) -> None:
    repository = MemoryRepository(snapshot)
    old = attach_pack(repository, snapshot, b"1", "web", created="2026-01-01T00:00:00.000001Z")
    new = attach_pack(repository, snapshot, b"2", "web", created="2026-01-01T00:00:00.000002Z")
    attach_pack(repository, snapshot, b"3", "job", default=False, created="2026-06-01T00:00:00Z")
    packs = boot_packs(repository, snapshot.digest)
    assert names(repository, snapshot) == ["job", "web"]
    assert old != new
    chosen = choose(packs, AUTO)
    assert chosen is not None and chosen.blob.digest == new
    job = choose(packs, "job")
    assert job is not None and job.name == "job"
    assert choose(packs, "other") is None
    assert choose([], AUTO) is None
    assert choose(packs[:1], AUTO) == packs[0]


@pytest.mark.parametrize("size", ["0", "-1", "x", str(1 << 40), ""])
def test_a_bad_description_is_left_out(snapshot: BuiltSnapshot, size: str) -> None:
    repository = MemoryRepository(snapshot)
    attach_pack(repository, snapshot, b"1", "web")
    attach_pack(repository, snapshot, b"2", "bad")
    entry = repository.subjects[snapshot.digest][1]
    bad = replace(entry, annotations={**entry.annotations, SIZE: size})
    repository.subjects[snapshot.digest][1] = bad
    assert names(repository, snapshot) == ["web"]


def test_names() -> None:
    assert name_of_command(["/usr/sbin/nginx", "-g"]) == "nginx"
    assert name_of_command([]) == name_of_command(["./"]) == name_of_command(["none"]) == "default"
    assert check_name("python3.11") == "python3.11"
    for name in ("", "none", "-x", "a b", "x" * 65, "a/b"):
        with pytest.raises(InvalidArgument):
            check_name(name)


def test_annotations_round_trip(snapshot: BuiltSnapshot) -> None:
    repository = MemoryRepository(snapshot)
    attach_pack(repository, snapshot, b"123", "web", default=False)
    pack = boot_packs(repository, snapshot.digest)[0]
    assert isinstance(pack, BootPack)
    assert (pack.name, pack.blob.size, pack.default) == ("web", 3, False)
