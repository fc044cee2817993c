"""The emitted device in the hands of the kernel, next to overlayfs and fsck.erofs as judges."""

import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from imgsnap.formats import erofs
from imgsnap.formats.layer_index import Kind
from tests.support.images import Bytes, ErofsReader, device, fsck, read_everything
from tests.support.layers import Layer, Link, Node, directory, encode_device, regular, symlink
from tests.support.mounts import MS_RDONLY, mounted, private_namespace
from tests.support.overlay import overlay
from tests.support.stacks import stacks
from tests.support.trees import Facts, observe, visible_nlink

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A directory on disk (the kernel mounts EROFS from no tmpfs file), with a tmpfs below it."""
    base = Path(tempfile.mkdtemp(prefix="imgsnap-", dir="/var/tmp"))
    try:
        with private_namespace(), mounted("tmpfs", base / "tmpfs", "tmpfs"):
            yield base
    finally:
        shutil.rmtree(base)


def kernel_view(data: bytes, scratch: Path) -> dict[bytes, Facts]:
    """The device through fsck.erofs and the kernel's EROFS."""
    image = scratch / "image"
    image.write_bytes(data)
    fsck(image)
    with mounted(str(image), scratch / "mnt", "erofs", MS_RDONLY) as root:
        return observe(root)


def overlay_view(layers: list[Layer], scratch: Path) -> dict[bytes, Facts]:
    work = Path(tempfile.mkdtemp(dir=scratch / "tmpfs"))
    try:
        with overlay(layers, work) as root:
            return observe(root)
    finally:
        shutil.rmtree(work)


def compare(ours: dict[bytes, Facts], theirs: dict[bytes, Facts]) -> None:
    assert sorted(ours) == sorted(theirs)
    links = visible_nlink(theirs)
    for path, facts in ours.items():
        assert facts.nlink == links[path], path
        expected = theirs[path]
        expected.nlink = facts.nlink
        assert facts == expected, path


def check_reader(data: bytes, kernel: dict[bytes, Facts]) -> None:
    """ErofsReader and the kernel agree on everything."""
    mine = read_everything(ErofsReader(Bytes(data)))
    assert sorted(mine) == sorted(kernel)
    nids: dict[int, set[bytes]] = {}
    for path, (inode, xattrs, content) in mine.items():
        facts = kernel[path]
        nids.setdefault(inode.nid, set()).add(path)
        assert erofs.KIND_MODE[inode.kind] | inode.mode == facts.mode
        assert (inode.uid, inode.gid, inode.nlink) == (facts.uid, facts.gid, facts.nlink)
        assert inode.mtime * 10**9 + inode.nsec == facts.mtime_ns
        assert dict(xattrs) == facts.xattrs
        assert content == (facts.target or facts.content)
        major, minor = os.major(facts.rdev), os.minor(facts.rdev)
        assert inode.rdev == encode_device(major, minor)
    for path, facts in kernel.items():
        if not stat.S_ISDIR(facts.mode):
            assert nids[mine[path][0].nid] == set(facts.links)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(stacks)
def test_any_stack_looks_as_overlayfs_shows_it(scratch: Path, layers: list[Layer]) -> None:
    data = device(layers)
    kernel = kernel_view(data, scratch)
    compare(kernel, overlay_view(layers, scratch))
    check_reader(data, kernel)


def test_no_layers_and_an_empty_layer(scratch: Path) -> None:
    for layers in ([], [Layer()]):
        kernel = kernel_view(device(layers), scratch)
        assert list(kernel) == [b""]
        assert kernel[b""].mode == stat.S_IFDIR | 0o755
        assert (kernel[b""].mtime_ns, kernel[b""].nlink) == (0, 2)


def test_inodes_that_fill_a_block_exactly(scratch: Path) -> None:
    """fsck.erofs reads past the last inode; there must be something to read."""
    for count in range(35, 48):
        entries: dict[bytes, Node | Link] = {b"%03d" % n: Node(Kind.FIFO) for n in range(count)}
        assert len(kernel_view(device([Layer(entries)]), scratch)) == count + 1


def test_directories_and_symlinks_around_a_block(scratch: Path) -> None:
    """Sizes about where data stops to fit inline (64 bytes below a block) and in one block."""
    entries: dict[bytes, Node | Link] = {b"!": Node(Kind.FIFO)}
    for size in [*range(4000, 4040), *range(4085, 4105), *range(8185, 8200)]:
        top = b"d%d" % size
        entries[top] = directory()
        room = size - 27  # two dirents, "." and ".."
        count = room // 200 + 1
        for number in range(count):
            length = room // count + (number < room % count) - 12
            name = b"%03d" % number + b"x" * (length - 3)
            entries[top + b"/" + name] = Link(b"!")
        if size <= 4095:
            entries[b"s%d" % size] = symlink(b"t" * size)
    data = device([Layer(entries)])
    kernel = kernel_view(data, scratch)
    check_reader(data, kernel)
    assert sorted(kernel) == sorted({b"", *entries})
    sizes = {path: inode.size for path, inode in ErofsReader(Bytes(data)).walk()}
    assert sizes[b"d4096"] == 4096
    assert sizes[b"d4095"] == 4095


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as the kernel's xattr has it: (tag, permissions, id) each."""
    packed = (struct.pack("<HHI", tag, bits, number) for tag, bits, number in entries)
    return struct.pack("<I", 2) + b"".join(packed)


NO_ID = 0xFFFFFFFF
ACL = acl((1, 6, NO_ID), (2, 4, 1000), (4, 4, NO_ID), (16, 4, NO_ID), (32, 0, NO_ID))


def test_acls_and_capabilities(scratch: Path) -> None:
    access, default = b"system.posix_acl_access", b"system.posix_acl_default"
    capability = (b"security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    layers = [
        Layer(
            {
                b"d": directory(mode=0o640, xattrs=((access, ACL), (default, ACL))),
                b"d/ping": regular(b"elf", mode=0o755, xattrs=(capability,)),
                b"f": regular(b"x", mode=0o640, xattrs=((access, ACL),)),
            }
        ),
        Layer({b"d/new": regular(b"y")}),
    ]
    data = device(layers)
    kernel = kernel_view(data, scratch)
    compare(kernel, overlay_view(layers, scratch))
    check_reader(data, kernel)
    assert kernel[b"d"].xattrs == {access: ACL, default: ACL}


def test_a_directory_with_seventy_thousand_entries(scratch: Path) -> None:
    entries: dict[bytes, Node | Link] = {b"d": directory()}
    entries |= {b"d/entry-%07d" % number: Node(Kind.FIFO) for number in range(70_000)}
    entries[b"d/!"] = regular(b"first")
    data = device([Layer(entries)])
    kernel = kernel_view(data, scratch)
    assert sorted(kernel) == sorted({b"", *entries})
    reader = ErofsReader(Bytes(data))
    assert [path for path, _ in reader.walk()] == sorted(kernel)
    for name in (b"!", b"entry-0000000", b"entry-0034567", b"entry-0069999"):
        assert reader.lookup(b"d/" + name).mode == 0o644


def test_xattrs_of_many_blocks_and_links_beside_them(scratch: Path) -> None:
    """Bodies that cross blocks, and symlinks and directories that no longer fit beside them."""
    big = tuple((b"trusted.%03d\xff" % n, bytes([n]) * 1900) for n in range(100))
    some = ((b"trusted.pad", b"p" * 1000),)
    entries: dict[bytes, Node | Link] = {
        b"file": regular(b"content", xattrs=((b"user.\x01\x80", b"v" * 65535),)),
        b"link": symlink(b"t" * 4095, xattrs=some),
        b"plain": symlink(b"t" * 4095),
        b"inline": symlink(b"t" * 3000, xattrs=some),
        b"dir": directory(xattrs=big),
    }
    entries |= {b"dir/" + b"%02d" % n * 100: Node(Kind.FIFO) for n in range(40)}
    data = device([Layer(entries)])
    kernel = kernel_view(data, scratch)
    check_reader(data, kernel)
    for path, node in entries.items():
        assert kernel[path].xattrs == dict(node.xattrs)
        assert kernel[path].target == node.target


def test_hard_links_into_lower_layers(scratch: Path) -> None:
    layers = [
        Layer({b"a/f": regular(b"one"), b"a/g": Link(b"a/f"), b"b": regular(b"two")}),
        # In tar order: the links first, then their targets are removed and replaced.
        Layer(
            {b"x": Link(b"a/f"), b"y": Link(b"b", lower=True), b"b": regular(b"three")},
            whiteouts={b"a"},
        ),
        Layer({b"z": Link(b"y")}),
    ]
    kernel = kernel_view(device(layers), scratch)
    assert {path: (facts.nlink, facts.content) for path, facts in kernel.items() if path} == {
        b"b": (1, b"three"),
        b"x": (1, b"one"),
        b"y": (2, b"two"),
        b"z": (2, b"two"),
    }
