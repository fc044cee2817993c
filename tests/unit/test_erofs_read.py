"""ErofsReader on devices of our writer, on one of mkfs.erofs, and on hostile ones."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from imgsnap.errors import FormatError, InvalidArgument, NotFound, Unsupported, UnsupportedFormat
from imgsnap.formats import erofs
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.erofs_xattr import XATTR_VALUE_MAX
from imgsnap.formats.layer_index import Kind
from imgsnap.units import BLOCK_SIZE
from tests.support.golden import golden_files, read_golden
from tests.support.images import Bytes, device, emit_layers, read_everything, reader
from tests.support.layers import Layer, Node, build, build_all, directory, regular, symlink

LAYER = Layer(
    {
        b"bin": symlink(b"usr/bin"),
        b"usr/bin": directory(),
        b"usr/bin/sh": symlink(b"../lib/dash"),
        b"usr/bin/up": symlink(b"../../../../usr/lib"),
        b"usr/lib/dash": regular(b"d" * 5000),
        b"usr/lib/abs": symlink(b"//usr/./bin/sh"),
        b"loop": symlink(b"loop"),
        b"gone": symlink(b"nowhere"),
        b"empty": regular(b""),
    }
)


def test_golden_device() -> None:
    data = read_golden("erofs-v1.hex")
    assert data == golden_files()["erofs-v1.hex"]
    found = read_everything(ErofsReader(Bytes(data)))
    assert sorted(found) == sorted(
        b" - bin bin/tool bin/tool2 dev dev/sda dev/tty etc etc/issue etc/passwd".split(b" ")
    )
    tool, xattrs, content = found[b"bin/tool"]
    assert (tool.mode, tool.nlink, content) == (0o4755, 2, b"\x7fELF" + bytes(8000))
    assert [name for name, _ in xattrs] == [b"security.capability", b"user.k\xff"]
    root = found[b""][0]
    assert (root.uid, root.gid, root.mtime, root.nsec, root.nlink) == (7, 8, -1, 999_999_999, 5)


def test_lookup_does_not_follow() -> None:
    found = reader([LAYER])
    assert found.lookup(b"") == found.lookup(b"/") == found.root
    assert found.lookup(b"/bin/").kind == Kind.SYMLINK
    assert found.readlink(found.lookup(b"bin")) == b"usr/bin"
    for path in (b"none", b"usr/none", b"bin/sh", b"empty/x", b"zzz", b"!"):
        with pytest.raises(NotFound):
            found.lookup(path)
    with pytest.raises(InvalidArgument):
        found.lookup(b"usr/../bin")
    with pytest.raises(InvalidArgument):
        found.readlink(found.root)
    with pytest.raises(InvalidArgument):
        list(found.entries(found.lookup(b"empty")))


def test_resolve_follows_within_the_root() -> None:
    found = reader([LAYER])
    dash = found.lookup(b"usr/lib/dash")
    for path in (
        b"bin/sh",
        b"/usr/lib/abs",
        b"usr/bin/up/dash",
        b"../../usr/../bin/sh",
        b"bin//sh",
    ):
        assert found.resolve(path) == dash
    assert found.resolve(b"..") == found.root
    for path in (b"loop", b"gone", b"usr/none", b"bin/sh/x"):
        with pytest.raises(NotFound):
            found.resolve(path)


def test_read_ranges() -> None:
    found = reader([LAYER])
    dash = found.lookup(b"usr/lib/dash")
    assert found.read(dash, 0, 1 << 40) == b"d" * 5000
    assert found.read(dash, 4999, 10) == b"d"
    assert found.read(dash, 5000, 10) == found.read(dash, 10**30, 1) == b""
    assert found.read(found.lookup(b"empty"), 0, 10) == b""
    with pytest.raises(InvalidArgument):
        found.read(dash, -1, 1)


def test_equal_input_gives_equal_bytes_and_the_uuid_covers_file_content() -> None:
    layers = [Layer({b"a": regular(b"1"), b"d/e": regular(b"2")}), LAYER]
    first, second = emit_layers(build_all(layers)), emit_layers(build_all(layers))
    assert first == second
    other = emit_layers(build_all([Layer({b"a": regular(b"3"), b"d/e": regular(b"2")}), LAYER]))
    assert other.uuid != first.uuid
    assert len(other.metadata) == len(first.metadata)


def test_bases_are_the_extents_in_order() -> None:
    built = build_all([Layer({b"a": regular(b"1" * 5000)}), Layer(), LAYER])
    metadata = emit_layers(built)
    blocks = len(metadata.metadata) // BLOCK_SIZE
    assert metadata.bases == (blocks, blocks + 2, blocks + 2)
    assert metadata.total_blocks == blocks + 4
    superblock = erofs.parse_superblock(metadata.metadata[:BLOCK_SIZE])
    assert superblock.incompat == superblock.build_time == 0
    assert superblock.blocks == metadata.total_blocks
    assert superblock.inodes == metadata.inode_count == 13
    assert superblock.uuid == metadata.uuid


def test_what_erofs_cannot_hold_is_named_with_its_path() -> None:
    for xattrs, match in (
        (((b"user.big", bytes(XATTR_VALUE_MAX + 1)),), "/d/f.*user.big.*65536 bytes"),
        (((b"system.other", b""),), "/d/f.*system.other"),
        (((b"user.", b""),), "/d/f.*user"),
        (((b"user." + b"n" * 260, b""),), "/d/f.*265 bytes"),
        (tuple((b"user.%02d" % n, bytes(60000)) for n in range(5)), "/d/f: the xattrs together"),
    ):
        built = build_all([Layer({b"d/e": Node(Kind.FIFO), b"d/f": regular(xattrs=xattrs)})])
        with pytest.raises(Unsupported, match=match):
            emit_layers(built)
    huge = build(Layer())
    huge.index.extent_blocks = 1 << 32
    with pytest.raises(Unsupported, match="EROFS addresses"):
        emit_layers([huge])


def with_checksum(data: bytes | bytearray) -> bytes:
    checksum = erofs.superblock_checksum(data)
    return bytes(data[:1028]) + checksum.to_bytes(4, "little") + bytes(data[1032:])


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return with_checksum(data[:at] + value + data[at + len(value) :])


def test_superblock_refusals() -> None:
    data = device([LAYER])
    for at, value, error, match in (
        (1024, b"\0", FormatError, "magic at offset 1024"),
        (1036, b"\x0d", UnsupportedFormat, "block size"),
        (1024 + 80, b"\1", UnsupportedFormat, "incompatible features 0x1"),
        (1024 + 90, b"\1", UnsupportedFormat, "directory blocks"),
    ):
        with pytest.raises(error, match=match):
            ErofsReader(Bytes(patched(data, at, value)))
    with pytest.raises(FormatError, match="checksum at offset 1028"):
        ErofsReader(Bytes(data[:2000] + b"\xff" + data[2001:]))
    for length in (0, 1, 1152, BLOCK_SIZE - 1):
        with pytest.raises(FormatError):
            ErofsReader(Bytes(data[:length]))
    with pytest.raises(FormatError, match="not a directory"):
        nid = reader([LAYER]).lookup(b"empty").nid
        _ = ErofsReader(Bytes(patched(data, 1038, struct.pack("<H", nid)))).root


def test_directory_loops_end_in_an_error() -> None:
    data = device([Layer({b"a/b": directory()})])
    root = reader([Layer({b"a/b": directory()})]).root.nid
    a = reader([Layer({b"a/b": directory()})]).lookup(b"a").nid
    b = reader([Layer({b"a/b": directory()})]).lookup(b"a/b").nid
    entry = struct.pack("<Q", b)
    for target in (root, a):
        looped = data.replace(entry, struct.pack("<Q", target), 1)
        with pytest.raises(FormatError):
            list(ErofsReader(Bytes(with_checksum(looped))).walk())


def test_a_device_of_mkfs_erofs(tmp_path: Path) -> None:
    """A judge of the reader: compact inodes, and a writer that is not ours."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for number in range(300):
        (source / "sub" / f"file-{number:03d}").write_bytes(bytes([number % 251]) * number * 20)
    (source / "link").symlink_to("sub/file-000")
    image = tmp_path / "image"
    tool = shutil.which("mkfs.erofs")
    assert tool, "erofs-utils is a test dependency"
    options = ["-x-1", "-Elegacy-compress,force-inode-compact", "-T1700000000"]
    subprocess.run([tool, *options, str(image), str(source)], check=True, capture_output=True)
    found = read_everything(ErofsReader(Bytes(image.read_bytes())))
    assert len(found) == 303
    for number in range(300):
        inode, _, content = found[b"sub/file-%03d" % number]
        assert content == bytes([number % 251]) * number * 20
        assert inode.mtime == 1_700_000_000
        assert inode.xattr_offset - (inode.nid << erofs.SLOT_BITS) == erofs.COMPACT_INODE.size
    assert found[b"link"][2] == b"sub/file-000"
