"""One layer into a directory: everything is kept, everything is verified, nothing gets out."""

import gzip
import os
import stat
import struct
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.convert.limits import Limits
from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import (
    DigestMismatch,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    ResourceExhausted,
    Unsupported,
)
from imgsnap.oci.layout import LayoutRepository
from imgsnap.snapshotter.layer_tree import DEPTH_MAX
from imgsnap.snapshotter.unpack_layer import Unpacker
from tests.support.mounts import mounted
from tests.support.samples import base_tar, top_tar
from tests.support.tars import BLOCK, Item, end, header, layer_tar, pax, raw_item
from tests.support.trees import observe
from tests.support.unpacked import REPOSITORY, layers_of, stacked, unpack_stack, unpacker

pytestmark = pytest.mark.root
DIR, LINK, SYM = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, owner)
    for tag, permissions, owner in (
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 4, 1234),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    )
)


def unpack(tmp_path: Path, *items: Item) -> Path:
    return unpack_stack([layer_tar(items)], tmp_path)[0]


def test_everything_is_kept(tmp_path: Path):
    time = "1700000000.123456789"
    root = unpack(
        tmp_path,
        Item(b"./", DIR, mode=0o751, uid=5, mtime=time),
        Item(b"d", DIR, mode=0o1777, uid=1, gid=2, mtime="-1.5", xattrs={b"user.d": b"\0"}),
        Item(b"d/su", mode=0o6755, uid=1000, gid=70000, content=b"x", mtime=time),
        Item(b"d/hard", LINK, link=b"d/su"),
        Item(b"d/cap", xattrs={b"security.capability": CAPABILITY, b"user.e": b""}, uid=7),
        Item(b"d/acl", mode=0o660, xattrs={b"system.posix_acl_access": ACL}),
        Item(b"d/hidden", xattrs={b"trusted.overlay.opaque": b"y", b"trusted.t": b"1"}),
        Item(b"link", SYM, link=b"/etc/passwd", uid=9, mode=0o777, mtime=time),
        Item(b"null", tarfile.CHRTYPE, device=(1, 3), mode=0o666, mtime=time),
        Item(b"disk", tarfile.BLKTYPE, device=(259, 70000), uid=3),
        Item(b"pipe", tarfile.FIFOTYPE, mode=0o622),
        Item(b"\xff\xfe \n", content=b"odd"),
    )
    found = observe(root)
    assert found[b""].mode == stat.S_IFDIR | 0o751 and found[b""].uid == 5
    assert found[b""].mtime_ns == 1_700_000_000_123_456_789
    assert (found[b"d"].mode, found[b"d"].gid) == (stat.S_IFDIR | 0o1777, 2)
    assert found[b"d"].mtime_ns == -1_500_000_000 and found[b"d"].xattrs == {b"user.d": b"\0"}
    su = found[b"d/su"]
    assert (su.mode, su.uid, su.gid, su.content) == (stat.S_IFREG | 0o6755, 1000, 70000, b"x")
    assert su.links == (b"d/hard", b"d/su") and su.mtime_ns == 1_700_000_000_123_456_789
    assert found[b"d/cap"].xattrs == {b"security.capability": CAPABILITY, b"user.e": b""}
    assert found[b"d/acl"].xattrs == {b"system.posix_acl_access": ACL}
    assert found[b"d/hidden"].xattrs == {b"trusted.t": b"1"}
    assert (found[b"link"].target, found[b"link"].uid) == (b"/etc/passwd", 9)
    assert found[b"link"].mtime_ns == 1_700_000_000_123_456_789
    assert found[b"null"].mode == stat.S_IFCHR | 0o666 and found[b"null"].rdev == os.makedev(1, 3)
    assert found[b"disk"].rdev == os.makedev(259, 70000) and found[b"disk"].uid == 3
    assert found[b"pipe"].mode == stat.S_IFIFO | 0o622
    assert found[b"\xff\xfe \n"].content == b"odd"


def test_a_sparse_file_stays_sparse(tmp_path: Path):
    size, data = 1 << 30, b"d" * BLOCK
    table = b"%011o\0%011o\0" % (size - BLOCK, BLOCK)
    tail = table.ljust(96, b"\0") + b"\0" + b"%011o\0" % size
    tail += bytes(BLOCK - 386 - len(tail))
    sparse = header(b"big", size=BLOCK, kind=b"S", magic=b"ustar  \0", tail=tail) + data
    (root,) = unpack_stack([sparse + end()], tmp_path)
    status = (root / "big").stat()
    assert status.st_size == size and status.st_blocks * 512 < 1 << 20
    with (root / "big").open("rb") as file:
        file.seek(size - BLOCK - 1)
        assert file.read() == b"\0" + data


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_compressions_and_whiteouts(tmp_path: Path, compression: str):
    top, base = unpack_stack([base_tar(), top_tar()], tmp_path, compression)
    gone = (top / "etc/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    assert (base / "usr/noise").stat().st_size == 300_000
    with stacked([top, base], tmp_path) as view:
        assert sorted(os.listdir(view / "etc")) == ["hosts"]
        assert (view / "etc/hosts").read_bytes() == b"replaced by top\n"
        assert (view / "usr/linked").read_bytes() == (view / "usr/text").read_bytes()
        assert os.getxattr(view / "usr/linked", "user.note") == b"\0\xff"
        usr = (view / "usr").stat()
        assert usr.st_mtime_ns == 1_700_000_000_123_456_789, "the upper layer only implies usr"


def test_opaque_directories_and_an_opaque_root(tmp_path: Path):
    base = layer_tar(
        [
            Item(b"a", DIR, mode=0o700),
            Item(b"a/old", content=b"1"),
            Item(b"b/old", content=b"1"),
            Item(b"c", content=b"1"),
        ]
    )
    middle = layer_tar([Item(b"a/.wh..wh..opq"), Item(b"a/new", content=b"2")])
    top = layer_tar([Item(b".wh..wh..opq"), Item(b"b/new", content=b"3")])
    directories = unpack_stack([base, middle, top], tmp_path)
    with stacked(directories[1:], tmp_path) as view:
        assert os.listdir(view / "a") == ["new"] and (view / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "empty").rmdir()
    with stacked(directories, tmp_path) as view:
        assert os.listdir(view) == ["b"] and os.listdir(view / "b") == ["new"]


# Lies about the bytes -----------------------------------------------------------------------------


def refused(tmp_path: Path, error: type[ImgsnapError], layer, **tool) -> str:
    directory = tmp_path / "refused"
    directory.mkdir()
    made = replace(unpacker(tmp_path / "layout", tmp_path / "work"), **tool)
    with pytest.raises(error) as raised:
        made.unpack(REPOSITORY, layer, directory, [])
    assert list((tmp_path / "work").iterdir()) == [], "no spooled tar is left"
    assert list(directory.iterdir()) == [] or error in (Unsupported, ResourceExhausted)
    return str(raised.value)


def blob_of(tmp_path: Path, layer) -> Path:
    return tmp_path / "layout/blobs/sha256" / layer.digest[7:]


def test_a_blob_that_is_not_its_digest(tmp_path: Path):
    (layer,) = layers_of([base_tar()], tmp_path / "layout", "gzip")
    path = blob_of(tmp_path, layer)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(tmp_path, IntegrityError, layer)


def test_a_tar_that_is_not_its_diff_id(tmp_path: Path):
    """Else a layer that anybody pushed could stand for a base image's."""
    (layer,) = layers_of([base_tar()], tmp_path / "layout", "gzip")
    wrong = replace(layer, diff_id=Digest("sha256:" + "1" * 64))
    assert "decompressed" in refused(tmp_path, DigestMismatch, wrong)


def test_a_blob_that_is_cut_off_missing_or_a_bomb(tmp_path: Path):
    (layer,) = layers_of([base_tar()], tmp_path / "layout", "gzip")
    small = Limits(layer_size=10_000)
    assert "layer-size" in refused(tmp_path, LimitExceeded, layer, limits=small)
    (tmp_path / "refused").rmdir()
    path = blob_of(tmp_path, layer)
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, IntegrityError, layer)
    (tmp_path / "refused").rmdir()
    path.unlink()
    refused(tmp_path, NotFound, layer)


def test_bytes_after_the_gzip_stream_count(tmp_path: Path):
    tar = layer_tar([Item(b"a", content=b"1")])
    blob = gzip.compress(tar) + b"more"
    (layer,) = layers_of([tar], tmp_path / "layout")
    layer = replace(layer, digest=sha256_digest(blob), size=len(blob))
    blob_of(tmp_path, layer).write_bytes(blob)
    assert "other bytes" in refused(tmp_path, IntegrityError, layer)


# Ways out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "error"),
    [
        ([Item(b"../out", content=b"x")], IntegrityError),
        ([Item(b"a/../../out", content=b"x")], IntegrityError),
        ([Item(b"a", LINK, link=b"../../secret")], IntegrityError),
        ([Item(b"a", content=b"x"), Item(b"a/b", content=b"y")], IntegrityError),
        ([Item(b"a", LINK, link=b"nowhere")], IntegrityError),
        ([Item(b"d", DIR), Item(b"a", LINK, link=b"d")], IntegrityError),
        ([Item(b"d/.wh..", content=b"")], IntegrityError),
        ([Item(b".", content=b"no directory")], IntegrityError),
        ([Item(b"a", uid=0xFFFFFFFF)], IntegrityError),
        ([Item(b"n" * 256)], IntegrityError),
        ([Item(b"d/" * (DEPTH_MAX + 1) + b"f")], LimitExceeded),
        ([Item(b"a", xattrs={b"security.capability": b"none"})], Unsupported),
        ([Item(b"l", SYM, link=b"l"), Item(b"l/a", content=b"x")], IntegrityError),
    ],
)
def test_layers_that_are_refused(tmp_path: Path, items, error):
    (tmp_path / "secret").write_text("secret")
    (layer,) = layers_of([layer_tar(items)], tmp_path / "layout")
    directory = tmp_path / "refused"
    directory.mkdir()
    with pytest.raises(error):
        unpacker(tmp_path / "layout", tmp_path / "work").unpack(REPOSITORY, layer, directory, [])
    assert not (tmp_path / "out").exists() and not (tmp_path / "a").exists()
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_nothing_is_written_through_links_or_outside(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    target = os.fsencode(outside)
    root = unpack(
        tmp_path,
        Item(b"absolute", SYM, link=target),
        Item(b"absolute/a", content=b"inside"),
        Item(b"up", SYM, link=b"../../../../../../../.." + target),
        Item(b"up/b", content=b"inside"),
        Item(target + b"/c", content=b"inside"),
        Item(b"twice", SYM, link=target + b"/d"),
        Item(b"twice", content=b"second"),
        Item(b"dir", DIR),
        Item(b"dir", SYM, link=target),
        Item(b"dir/e", content=b"inside"),
        Item(b"file", content=b"1"),
        Item(b"file", DIR, mode=0o755),
        Item(b"file/g", content=b"2"),
    )
    assert list(outside.iterdir()) == []
    inside = root / str(outside).lstrip("/")
    assert sorted(os.listdir(inside)) == ["a", "b", "c", "e"]
    assert (root / "twice").read_bytes() == b"second" and not (root / "twice").is_symlink()
    assert (root / "file/g").read_bytes() == b"2"


def test_a_lower_layers_links_lead_nowhere_else(tmp_path: Path):
    """A hard link into a lower layer, through a symlink of it, stays inside the layers."""
    (tmp_path / "secret").write_text("secret")
    secret = os.fsencode(tmp_path)
    base = layer_tar([Item(b"l", SYM, link=secret), Item(b"f", content=b"f", mode=0o600, uid=8)])
    (lower,) = unpack_stack([base], tmp_path)
    top = layer_tar([Item(b"x", LINK, link=b"l/secret")])
    good = layer_tar([Item(b"y", LINK, link=b"f"), Item(b"z", LINK, link=b"f")])
    layers = layers_of([base, top, good], tmp_path / "layout")
    tool = unpacker(tmp_path / "layout", tmp_path / "work")
    for name in "tg":
        (tmp_path / name).mkdir()
    with pytest.raises(IntegrityError, match="in no lower layer"):
        tool.unpack(REPOSITORY, layers[1], tmp_path / "t", [lower])
    tool.unpack(REPOSITORY, layers[2], tmp_path / "g", [lower])
    found = observe(tmp_path / "g")
    assert found[b"y"].links == (b"y", b"z")
    assert (found[b"y"].content, found[b"y"].uid, found[b"y"].nlink) == (b"f", 8, 2)
    assert (lower / "f").stat().st_nlink == 1


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path: Path):
    (layer,) = layers_of([base_tar()], tmp_path / "layout")
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/mine").write_text("x")
    tool = unpacker(tmp_path / "layout", tmp_path / "work")
    with pytest.raises(InvalidArgument, match="not empty"):
        tool.unpack(REPOSITORY, layer, tmp_path / "fs", [])
    assert os.listdir(tmp_path / "fs") == ["mine"]


def test_a_full_disk_has_a_name(tmp_path: Path):
    (layer,) = layers_of([base_tar()], tmp_path / "layout")
    options = "size=256k"
    with mounted("tmpfs", tmp_path / "small", "tmpfs", 0, options) as small:
        (small / "fs").mkdir()
        tool = unpacker(tmp_path / "layout", tmp_path / "work")
        with pytest.raises(ResourceExhausted, match="No space left"):
            tool.unpack(REPOSITORY, layer, small / "fs", [])
        tool = unpacker(tmp_path / "layout", small / "work")
        (tmp_path / "fs").mkdir()
        with pytest.raises(ImgsnapError, match="No space left"):
            tool.unpack(REPOSITORY, layer, tmp_path / "fs", [])
        assert list((small / "work").iterdir()) == []


def test_the_place_is_a_registrys(tmp_path: Path):
    (layer,) = layers_of([base_tar()], tmp_path / "layout")
    asked = []

    def opened(location):
        asked.append(str(location))
        return LayoutRepository(tmp_path / "layout")

    (tmp_path / "fs").mkdir()
    Unpacker(opened, tmp_path / "work").unpack("h.test:5000/a/b", layer, tmp_path / "fs", [])
    assert asked == ["h.test:5000/a/b"]
    (tmp_path / "t").mkdir()
    with pytest.raises(InvalidArgument):
        Unpacker(opened, tmp_path / "work").unpack("oci:/etc", layer, tmp_path / "t", [])
    with pytest.raises(ImgsnapError, match="No such file"):
        Unpacker(opened, tmp_path / "work").unpack(REPOSITORY, layer, tmp_path / "none", [])


def test_pax_headers_alone_are_no_layer(tmp_path: Path):
    for number, tar in enumerate((pax([(b"path", b"x")]) + end(), raw_item(Item(b"a"))[:-1])):
        place = tmp_path / str(number)
        (layer,) = layers_of([tar], place / "layout")
        (place / "fs").mkdir()
        tool = unpacker(place / "layout", place / "work")
        with pytest.raises(IntegrityError):
            tool.unpack(REPOSITORY, layer, place / "fs", [])
