"""The layer index record: golden bytes, refusals that name their place, limits."""

import struct
from collections.abc import Callable

import pytest

from imgsnap.errors import FormatError, UnsupportedFormat
from imgsnap.formats import layer_index_layout as layout
from imgsnap.formats.crc32c import crc32c
from imgsnap.formats.layer_index import DirectoryRecord, LayerIndex
from imgsnap.formats.layer_index_codec import decode, encode
from tests.support.golden import LOWER, UPPER, golden_files, read_golden
from tests.support.layers import Layer, Link, build, directory, regular, symlink


def sample() -> LayerIndex:
    """Rows: 0 d, 1 d/f, 2 d/s, 3 x."""
    return build(
        Layer(
            {
                b"d": directory(xattrs=((b"user.a", b"1"), (b"user.b", b"2"))),
                b"d/f": regular(b"content"),
                b"d/g": Link(b"lower/file"),
                b"d/s": symlink(b"target"),
                b"x": regular(b"other"),
            },
            whiteouts={b"d/gone", b"d/went"},
        )
    ).index


def patched(data: bytes, at: int, value: bytes) -> bytes:
    """`data` with other bytes at an offset, and a header checksum that fits."""
    changed = bytearray(data)
    changed[at : at + len(value)] = value
    changed[12:16] = layout.header_checksum(changed).to_bytes(4, "little")
    return bytes(changed)


def test_golden() -> None:
    data = read_golden("layer-index-v1.hex")
    assert data == golden_files()["layer-index-v1.hex"]
    assert decode(data) == build(UPPER).index


@pytest.mark.parametrize("layer", [Layer(), LOWER, UPPER])
def test_round_trip(layer: Layer) -> None:
    index = build(layer).index
    data = encode(index)
    assert decode(data) == index
    assert encode(decode(data)) == data
    assert decode(encode(sample())) == sample()


def test_crc32c_check_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_header_refusals() -> None:
    data = encode(sample())
    for at, value, error, match in (
        (0, b"X", FormatError, "magic at offset 0"),
        (8, b"\2", UnsupportedFormat, "version 2"),
        (24, b"\1", UnsupportedFormat, "incompatible features 0x1"),
        (60, b"\2", UnsupportedFormat, "rules index=2"),
        (72, b"\1", UnsupportedFormat, "chunk sizes"),
        (88, b"\xff\xff\xff\xff", FormatError, "inodes at offset 88: 4294967295 is over"),
        (124, b"\xff\xff\xff\x3f", FormatError, "path_bytes at offset 124"),
        (152, b"\1", FormatError, "reserved at offset 152"),
        (88, b"\5", FormatError, "length at offset .*: the header asks for"),
    ):
        with pytest.raises(error, match=match):
            decode(patched(data, at, value))
    with pytest.raises(FormatError, match="checksum at offset 12"):
        decode(data[:13] + b"\0" + data[14:] if data[13] else data[:13] + b"\1" + data[14:])
    # Unknown compatible features change nothing.
    assert decode(patched(data, 16, b"\xff" * 8)) == sample()


def test_every_limit_is_a_count_of_the_header_in_order() -> None:
    fields = layout.Header._fields
    first = fields.index("inodes")
    assert tuple(layout.COUNT_MAX) == fields[first : first + len(layout.COUNT_MAX)]
    assert {section.rows for section in layout.SECTIONS} == set(layout.COUNT_MAX)


def test_sizes_are_checked_before_anything_is_allocated() -> None:
    data = encode(sample())
    for number, maximum in enumerate(layout.COUNT_MAX.values()):
        with pytest.raises(FormatError, match="length"):
            decode(patched(data, 88 + 4 * number, struct.pack("<I", maximum)))


def record(index: LayerIndex, path: bytes) -> DirectoryRecord:
    return next(found for found in index.directories if found.path == path)


def set_item(column: str, row: int, value: int) -> Callable[[LayerIndex], None]:
    owner, _, name = column.partition(".")

    def change(index: LayerIndex) -> None:
        getattr(getattr(index, owner), name)[row] = value

    return change


def set_record(path: bytes, /, **values: object) -> Callable[[LayerIndex], None]:
    def change(index: LayerIndex) -> None:
        for name, value in values.items():
            setattr(record(index, path), name, value)

    return change


def set_index(**values: object) -> Callable[[LayerIndex], None]:
    def change(index: LayerIndex) -> None:
        for name, value in values.items():
            setattr(index, name, value)

    return change


BROKEN = [
    ("inode.kind[1]", set_item("inodes.kind", 1, 7)),
    ("inode.kind[1]", set_item("inodes.kind", 1, 0)),
    ("inode.mode[0]", set_item("inodes.mode", 0, 0o10000)),
    ("inode.nsec[2]", set_item("inodes.nsec", 2, 10**9)),
    ("inode.file[1]", set_item("inodes.file", 1, 3)),
    ("inode.size[1]", set_item("inodes.file", 1, 2)),
    ("inode.size[1]", set_item("inodes.size", 1, 0)),
    ("inode.size[2]", set_item("inodes.size", 2, 1)),
    ("inode.xattrs[0]", set_item("inodes.xattrs", 0, 2)),
    ("inode.target[2]", set_item("inodes.target", 2, 1)),
    ("inode.target[0]", set_item("inodes.target", 0, 1)),
    ("inode.rdev[0]", set_item("inodes.rdev", 0, 1)),
    ("file.size[0]", set_item("files.size", 0, 0)),
    ("file.size[1]", set_item("files.size", 1, 1 << 63)),
    ("file.block[1]", set_item("files.block", 1, 0)),
    ("file.block[1]", set_item("files.size", 0, 4097)),
    ("extent_blocks", set_index(extent_blocks=1)),
    ("target.end[0]", set_index(targets=[b""])),
    ("target.end[0]", set_index(targets=[b"t" * 4096])),
    ("target.end[0]", set_index(targets=[b"a\0b"])),
    ("lower_link.end[0]", set_index(lower_links=[b"/abs"])),
    ("lower_link.end[0]", set_index(lower_links=[b"a/../b"])),
    ("lower_link.end[0]", set_index(lower_links=[b""])),
    ("xattr_set.end[0]", set_index(xattr_sets=[])),
    ("xattr_set.end[0]", set_index(xattr_sets=[((b"a", b""),), ((b"a", b""),)])),
    ("xattr_set.end[1]", set_index(xattr_sets=[(), ((b"b", b""), (b"a", b""))])),
    ("xattr_set.end[1]", set_index(xattr_sets=[(), ((b"a", b""), (b"a", b""))])),
    ("xattr_set.end[1]", set_index(xattr_sets=[(), ()])),
    ("xattr.name_end[0]", set_index(xattr_sets=[(), ((b"", b""),)])),
    ("xattr.name_end[0]", set_index(xattr_sets=[(), ((b"a\0", b""),)])),
    ("xattr.name_end[0]", set_index(xattr_sets=[(), ((b"n" * 256, b""),)])),
    ("xattr.value_end[0]", set_index(xattr_sets=[(), ((b"a", bytes(65537)),)])),
    ("directory.path_end[0]", set_record(b"", path=b"a")),
    ("directory.path_end[1]", set_record(b"d", path=b"")),
    ("directory.path_end[1]", set_record(b"d", path=b"e/f")),
    ("directory.path_end[1]", set_record(b"d", path=b"..")),
    ("directory.path_end[1]", set_record(b"d", path=b"a\0")),
    ("directory.path_end[1]", set_record(b"d", path=b"n" * 256)),
    ("directory.path_end[1]", set_record(b"d", inode=1)),
    ("directory.path_end[1]", set_record(b"d", inode=4)),
    ("directory.path_end[1]", set_record(b"d", inode=-2)),
    ("directory.path_end[1]", set_record(b"", inode=0)),
    ("name.end[0]", set_record(b"", names=[b"d"])),
    ("name.end[0]", set_record(b"", names=[b"."])),
    ("name.end[0]", set_record(b"", names=[b"a/b"])),
    ("name.end[0]", set_record(b"", names=[b"a\0"])),
    ("name.end[0]", set_record(b"", names=[b""])),
    ("name.end[0]", set_record(b"", names=[b"n" * 256])),
    ("name.end[2]", set_record(b"d", names=[b"f", b"f", b"g"])),
    ("name.inode[2]", set_record(b"d", inodes=[1, 0, 2])),
    ("name.inode[2]", set_record(b"d", inodes=[1, -2, 2])),
    ("name.inode[3]", set_record(b"d", inodes=[1, -1, 4])),
    ("whiteout.end[1]", set_record(b"d", whiteouts=[b"b", b"a"])),
    ("whiteout.end[0]", set_record(b"d", whiteouts=[b".."])),
]


@pytest.mark.parametrize(("field", "change"), BROKEN)
def test_broken_values_are_neither_written_nor_read(
    field: str, change: Callable[[LayerIndex], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = sample()
    change(index)
    with pytest.raises(FormatError) as caught:
        encode(index)
    assert caught.value.field == field
    monkeypatch.setattr("imgsnap.formats.layer_index_codec.check_index", lambda *_: None)
    data = encode(index)
    monkeypatch.undo()
    with pytest.raises(FormatError) as caught:
        decode(data)
    assert caught.value.field == field
    assert caught.value.offset <= len(data)


def test_unused_bytes_and_flags_are_refused() -> None:
    data = encode(sample())
    header = layout.parse_header(data)
    places = layout.Layout.of(header)
    with pytest.raises(FormatError, match=r"padding of inode\.kind"):
        decode(patched(data, places.item("inode.kind", 4), b"\1"))
    with pytest.raises(FormatError, match=r"directory.opaque.*2, not 0 or 1"):
        decode(patched(data, places.item("directory.opaque", 1), b"\2"))
    with pytest.raises(FormatError, match=r"name.end at offset"):
        decode(patched(data, places.item("name.end", 0), b"\xff"))
    with pytest.raises(FormatError, match=r"name.end at offset"):
        decode(patched(data, places.item("name.end", 3), b"\3"))


def test_columns_of_different_length_are_refused() -> None:
    index = sample()
    index.inodes.uid.append(0)
    with pytest.raises(FormatError, match=r"inode\.uid"):
        encode(index)


def test_names_without_inodes_are_refused() -> None:
    index = sample()
    record(index, b"d").inodes.pop()
    with pytest.raises(FormatError, match=r"name\.end"):
        encode(index)
    record(index, b"").inodes.append(3)  # the totals are right again
    with pytest.raises(FormatError, match="not parallel"):
        encode(index)
