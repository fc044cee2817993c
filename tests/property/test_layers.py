"""Stacks of layer tars through the whole conversion, against two independent unpackers: the
reference tree of `check --source`, and umoci, which unpacks onto a real file system."""

import hashlib
import os
import stat
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.blockstore.flat import FlatDevice
from imgsnap.blockstore.materialise import materialise
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import open_snapshot
from imgsnap.convert.check import compare, reference_tree
from imgsnap.convert.limits import Limits
from imgsnap.convert.pipeline import Options
from imgsnap.convert.progress import Silent
from imgsnap.convert.publish import publish
from imgsnap.convert.source import select_images
from imgsnap.errors import IntegrityError
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.layer_index import Kind
from imgsnap.oci.layout import LayoutRepository
from tests.support.image_builder import image, write_layout
from tests.support.tar_stacks import Entry, stacks, to_tar, unambiguous, without_idle_whiteouts
from tests.support.trees import Facts, observe

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
MEMORY = "/dev/shm"  # nothing here needs to survive, and layouts sync what they write


def convert(tars: list[bytes], root: Path) -> tuple[LayoutRepository, Path]:
    """Converts an image of these layers; the source and the snapshot's flat device."""
    write_layout(root / "source", image(*tars, compression=""))
    source = LayoutRepository(root / "source")
    images = select_images(source, "latest", [], Limits())
    with (
        closing(LayoutRepository(root / "target", create=True)) as target,
        ChunkIndex(root / "index") as index,
    ):
        options = Options(work_dir=root / "work", jobs=1)
        publish(source, images, target, "snapshot", index, options, Silent())
        snapshot = open_snapshot(target, "snapshot", NodeCache(root / "cache"))
        with closing(snapshot):
            materialise(snapshot, root / "device")
    return source, root / "device"


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
@given(stacks())
def test_the_snapshot_is_what_the_reference_unpacks(layers: list[list[Entry]]) -> None:
    tars = [to_tar(layer) for layer in unambiguous(layers)]
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = Path(directory)
        try:
            source, device = convert(tars, root)
            (found,) = select_images(source, "latest", [], Limits())
            tree = reference_tree(source, found, root, Limits())
        except IntegrityError:
            assume(False)
        with FlatDevice(device) as flat:
            assert list(compare(ErofsReader(flat), tree)) == []
        source.close()


@pytest.mark.root
@settings(max_examples=25, deadline=None, suppress_health_check=QUIET)
@given(stacks())
def test_the_snapshot_is_what_umoci_unpacks(layers: list[list[Entry]]) -> None:
    # umoci makes no directory for the sake of a whiteout in it, as others do.
    tars = [to_tar(layer) for layer in without_idle_whiteouts(unambiguous(layers))]
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        root = Path(directory)
        try:
            _, device = convert(tars, root)
        except IntegrityError:
            assume(False)
        done = subprocess.run(
            ["umoci", "unpack", "--image", f"{root}/source:latest", f"{root}/bundle"],
            capture_output=True,
        )
        assume(done.returncode == 0)
        with FlatDevice(device) as flat:
            assert facts_of(ErofsReader(flat)) == {
                path: plain(facts) for path, facts in observe(root / "bundle/rootfs").items()
            }


COMPARED = (b"user.", b"security.")
"""Prefixes of xattrs that umoci writes; it keeps trusted.* only where the kernel lets it, and
like all of Go's tar reader none without a value (containerd reads the records itself)."""


def plain(facts: Facts) -> dict[str, object]:
    """What both sides tell of a path; umoci rounds and clamps mtimes."""
    is_link = stat.S_ISLNK(facts.mode)
    return {
        "type": stat.S_IFMT(facts.mode),
        "mode": 0o777 if is_link else stat.S_IMODE(facts.mode),
        "owner": (facts.uid, facts.gid),
        "size": 0 if is_link else facts.size,
        "device": facts.rdev if stat.S_ISCHR(facts.mode) or stat.S_ISBLK(facts.mode) else 0,
        "target": facts.target,
        "content": hashlib.sha256(facts.content).hexdigest(),
        "xattrs": {k: v for k, v in facts.xattrs.items() if v and k.startswith(COMPARED)},
        "links": facts.links,
    }


TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}


def facts_of(reader: ErofsReader) -> dict[bytes, dict[str, object]]:
    """The same of a snapshot."""
    inodes = dict(reader.walk())
    names: dict[int, list[bytes]] = {}
    for path, inode in inodes.items():
        names.setdefault(inode.nid, []).append(path)
    found = {}
    for path, inode in inodes.items():
        kind = Kind(inode.kind)
        is_file, is_link = kind == Kind.FILE, kind == Kind.SYMLINK
        content = reader.read(inode, 0, inode.size) if is_file else b""
        xattrs = dict(reader.xattrs(inode))
        found[path] = {
            "type": TYPES[kind],
            "mode": 0o777 if is_link else inode.mode,
            "owner": (inode.uid, inode.gid),
            "size": inode.size if is_file else 0,
            "device": _device(inode.rdev),
            "target": reader.readlink(inode) if is_link else b"",
            "content": hashlib.sha256(content).hexdigest(),
            "xattrs": {k: v for k, v in xattrs.items() if v and k.startswith(COMPARED)},
            "links": () if kind == Kind.DIRECTORY else tuple(sorted(names[inode.nid])),
        }
    return found


def _device(rdev: int) -> int:
    return os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00) if rdev else 0
