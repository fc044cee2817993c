"""Directories of containers, who may put anything in them."""

import os
from pathlib import Path

import pytest

from imgsnap.errors import InvalidArgument, NotFound
from imgsnap.snapshotter.directories import Directories, measure
from imgsnap.snapshotter.rows import Usage

DEPTH = 3000
"""Deeper than the stack, the descriptors of a process, and the kernel's longest path."""


def dig(directory: Path) -> None:
    before = os.getcwd()
    os.chdir(directory)
    try:
        for _ in range(DEPTH):
            os.mkdir("d")
            os.chdir("d")
        Path("file").write_text("deep")
    finally:
        os.chdir(before)


def test_any_depth_is_deleted(root: Path):
    directories = Directories(root)
    place = directories.settle(directories.create(writable=True), 1)
    dig(place / "fs")
    (place / "fs/link").symlink_to("/")
    outside = root / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (place / "fs/out").symlink_to(outside)
    directories.drop(1)
    directories.drop(1)  # missing ones are fine
    assert directories.numbers() == set()
    directories.empty_removed()
    assert list((root / "removed").iterdir()) == []
    assert (outside / "kept").exists()


def test_any_depth_is_measured(root: Path):
    directories = Directories(root)
    place = directories.create(writable=False)
    dig(place / "fs")
    assert measure(place / "fs").inodes > 1000
    directories.discard(place)
    directories.empty_removed()


def test_measured_as_du_does(root: Path):
    tree = root / "tree"
    tree.mkdir()
    (tree / "data").write_bytes(b"x" * 10000)
    (tree / "again").hardlink_to(tree / "data")
    (tree / "sparse").touch()
    os.truncate(tree / "sparse", 1 << 30)
    (tree / "link").symlink_to("/usr")
    names = ("", "data", "sparse", "link")
    blocks = sum((tree / name).lstat().st_blocks for name in names)
    assert measure(tree) == Usage(blocks * 512, len(names))
    with pytest.raises(NotFound):
        Directories(root).usage(7)


def test_only_unused_ones_go(root: Path):
    directories = Directories(root)
    for number in (1, 2):
        directories.settle(directories.create(writable=False), number)
    directories.create(writable=True)
    (root / "snapshots/strange").mkdir()
    directories.discard_unused({1, 3})
    assert [path.name for path in (root / "snapshots").iterdir()] == ["1"]


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b", 'a"b', "a\\b", "a\nb"])
def test_roots_that_overlayfs_could_not_name(root: Path, name: str):
    (root / name).mkdir()
    with pytest.raises(InvalidArgument):
        Directories(root / name)
    with pytest.raises(InvalidArgument):
        Directories(Path("relative"))
    assert not (root / name / "snapshots").exists()


def test_modes_whatever_the_umask(root: Path):
    before = os.umask(0o777)
    try:
        place = Directories(root).create(writable=True)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in place.iterdir()}
    assert modes == {"fs": 0o755, "work": 0o711}
