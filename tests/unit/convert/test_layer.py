"""The layer builder: what a layer's entries, in tar order, come to."""

import tarfile

import pytest
from blake3 import blake3

from imgsnap.convert.layer import build_layer
from imgsnap.convert.limits import Limits
from imgsnap.convert.tar import TarReader
from imgsnap.digest import Digest
from imgsnap.errors import FormatError
from imgsnap.formats.layer_index import Kind
from imgsnap.formats.rules import Rules
from tests.support.tars import Item, layer_tar

DIFF_ID = Digest("sha256:" + "0" * 64)
DIR, LINK, SYM = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE


def build(*items):
    raw = layer_tar(items)

    def digest(content):
        return blake3(b"".join(raw[p : p + n] for _, p, n in content.segments)).digest()

    return build_layer(TarReader(memoryview(raw), Limits()), DIFF_ID, Rules(), digest).index


def shape(index):
    """{path: what} with hard links into lower layers as `->target`."""
    found = {}
    for record in index.directories:
        found[record.path] = "dir" if record.inode >= 0 else "implicit"
        for name, row in zip(record.names, record.inodes, strict=True):
            path = record.path + b"/" + name if record.path else name
            if row < 0:
                found[path] = b"->" + index.lower_links[-row - 1]
            else:
                found[path] = Kind(index.inodes.kind[row]).name
    return found


def test_plain_tree_with_implicit_parents():
    index = build(Item(b"a/b/c", content=b"1"), Item(b"a/b", DIR), Item(b"z", SYM, link=b"a"))
    assert shape(index) == {
        b"": "implicit",
        b"a": "implicit",
        b"a/b": "dir",
        b"a/b/c": "FILE",
        b"z": "SYMLINK",
    }


def test_last_entry_wins_and_equal_contents_share_blocks():
    index = build(
        Item(b"a", content=b"old"),
        Item(b"a", content=b"x" * 5000, mode=0o600),
        Item(b"b", content=b"x" * 5000),
        Item(b"c", content=b""),
    )
    assert len(index.inodes) == 3
    assert len(index.files) == 1
    assert index.extent_blocks == 2
    assert list(index.inodes.file) == [1, 1, 0]
    assert index.inodes.mode[0] == 0o600


def test_rows_do_not_depend_on_tar_order():
    items = [Item(b"d/%d" % n, content=b"%d" % n) for n in range(9)]
    first, second = build(*items), build(*reversed(items))
    assert bytes(first.files.digest) == bytes(second.files.digest)
    assert first.directories == second.directories


def test_whiteouts_and_opaque():
    index = build(
        Item(b"d/.wh.gone"), Item(b"e/.wh..wh..opq"), Item(b"e/new"), Item(b"d/.wh..wh.plnk")
    )
    records = {record.path: record for record in index.directories}
    assert records[b"d"].whiteouts == [b"gone"]
    assert records[b"e"].opaque
    assert records[b"e"].names == [b"new"]


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh..."])
def test_whiteout_of_nothing_is_refused(name):
    with pytest.raises(FormatError, match="whiteout"):
        build(Item(b"d/" + name))


def test_hard_links_within_and_below():
    index = build(
        Item(b"f", content=b"1"),
        Item(b"g", LINK, link=b"f"),
        Item(b"h", LINK, link=b"g"),
        Item(b"f", content=b"2"),
        Item(b"low", LINK, link=b"usr/bin/x"),
        Item(b"self", LINK, link=b"self"),
    )
    (root,) = index.directories
    rows = dict(zip(root.names, root.inodes, strict=True))
    assert rows[b"g"] == rows[b"h"] != rows[b"f"]
    assert rows[b"low"] == -1
    assert index.lower_links == [b"usr/bin/x"]
    assert b"self" not in rows


def test_hard_link_to_a_directory_is_refused():
    with pytest.raises(FormatError, match="links to a directory"):
        build(Item(b"d", DIR), Item(b"l", LINK, link=b"d"))


def test_a_file_over_a_directory_removes_what_was_below_it():
    index = build(Item(b"d", DIR), Item(b"d/a/b"), Item(b"d", content=b"f"))
    assert shape(index) == {b"": "implicit", b"d": "FILE"}


def test_a_directory_over_a_file_starts_empty():
    index = build(
        Item(b"d", DIR), Item(b"d/old"), Item(b"d", content=b"f"), Item(b"d", DIR), Item(b"d/new")
    )
    assert shape(index) == {b"": "implicit", b"d": "dir", b"d/new": "FILE"}


def test_entries_below_a_symlink_of_the_layer_follow_it():
    index = build(
        Item(b"usr/lib", DIR),
        Item(b"lib", SYM, link=b"usr/lib"),
        Item(b"lib/x/y", content=b"1"),
        Item(b"abs", SYM, link=b"/usr"),
        Item(b"abs/z", content=b"2"),
        Item(b"up", SYM, link=b"../../usr"),
        Item(b"up/w", content=b"3"),
    )
    found = shape(index)
    assert found[b"usr/lib/x/y"] == found[b"usr/z"] == found[b"usr/w"] == "FILE"
    assert found[b"lib"] == "SYMLINK"


def test_symlink_loops_and_entries_below_files_are_refused():
    with pytest.raises(FormatError, match="symlinks"):
        build(Item(b"a", SYM, link=b"b"), Item(b"b", SYM, link=b"a"), Item(b"a/x"))
    with pytest.raises(FormatError, match="below a file"):
        build(Item(b"f", content=b"1"), Item(b"f/x"))


def test_the_root_may_have_an_entry_but_must_be_a_directory():
    index = build(Item(b"./", DIR, mode=0o700))
    assert index.directories[0].inode == 0
    assert index.inodes.mode[0] == 0o700
    with pytest.raises(FormatError, match="root"):
        build(Item(b"./", SYM, link=b"x"))


def test_xattrs_that_linux_cannot_hold_are_dropped():
    index = build(
        Item(
            b"f",
            xattrs={
                b"user.a": b"1",
                b"com.apple.provenance": b"2",
                b"trusted.overlay.redirect": b"/etc",
                b"system.posix_acl_access": b"3",
            },
        )
    )
    assert index.xattr_sets == [(), ((b"system.posix_acl_access", b"3"), (b"user.a", b"1"))]


def test_device_numbers_and_their_range():
    index = build(Item(b"c", tarfile.CHRTYPE, device=(5, 70_000)))
    assert index.inodes.rdev[0] == (70_000 & 0xFF) | 5 << 8 | (70_000 & ~0xFF) << 12
    with pytest.raises(FormatError, match="out of range"):
        build(Item(b"c", tarfile.CHRTYPE, device=(4096, 0)))


def test_two_thousand_directories_deep():
    index = build(Item(b"/".join([b"d"] * 2000) + b"/f", content=b"1"))
    assert len(index.directories) == 2001


def test_a_directory_after_a_file_hides_what_lower_layers_have():
    index = build(Item(b"c"), Item(b"c", DIR), Item(b"c/x", DIR), Item(b"d", DIR))
    opaque = {record.path for record in index.directories if record.opaque}
    assert opaque == {b"c"}
