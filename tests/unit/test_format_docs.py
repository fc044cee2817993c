"""docs/format says what the code does: offsets, sizes, types, sections and limits."""

import re
import struct
from pathlib import Path

import pytest

from imgsnap.formats import erofs, erofs_devices, erofs_xattr, layer_index_check, verity
from imgsnap.formats import layer_index_layout as layout

DOCS = Path(__file__).parent.parent.parent / "docs" / "format"
TYPES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i32": "i", "i64": "q", "bytes": "s"}

RECORDS = [
    ("layer-index.md", "Header", layout.HEADER, layout.Header),
    ("erofs.md", "Superblock", erofs.SUPERBLOCK, erofs.Superblock),
    ("erofs.md", "ExtendedInode", erofs.EXTENDED_INODE, erofs.ExtendedInode),
    ("erofs.md", "CompactInode", erofs.COMPACT_INODE, erofs.CompactInode),
    ("erofs.md", "Dirent", erofs.DIRENT, erofs.Dirent),
    ("erofs.md", "XattrHeader", erofs.XATTR_HEADER, erofs.XattrHeader),
    ("erofs.md", "XattrEntry", erofs.XATTR_ENTRY, erofs.XattrEntry),
    ("erofs.md", "DeviceSlot", erofs_devices.DEVICE_SLOT, erofs_devices.DeviceSlot),
    ("verity.md", "VeritySuperblock", verity.VERITY_SUPERBLOCK, verity.VeritySuperblock),
]


def section(page: str, heading: str) -> tuple[str, list[list[str]]]:
    """A heading's own text and the cells of the first table below it."""
    text = (DOCS / page).read_text()
    found = re.search(rf"^## {heading}\b(.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, heading
    lines = [line for line in found[2].splitlines() if line.startswith("|")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return found[1], rows[2:]


def members(record: struct.Struct, fields: tuple[str, ...]) -> list[tuple[int, int, str, str]]:
    """Offset, size, type character and name of each member; x and (reserved) for padding."""
    names = iter(fields)
    found = []
    offset = 0
    for digits, code in re.findall(r"(\d*)([a-zA-Z])", record.format):
        repeat = int(digits or 1)
        counts = [repeat] if code in "sx" else [1] * repeat
        for count in counts:
            size = struct.calcsize(f"<{count}{code}")
            found.append((offset, size, code, "(reserved)" if code == "x" else next(names)))
            offset += size
    assert next(names, None) is None
    assert offset == record.size
    return found


@pytest.mark.parametrize(("page", "heading", "record", "fields"), RECORDS)
def test_record_tables(page: str, heading: str, record: struct.Struct, fields: type) -> None:
    title, rows = section(page, heading)
    assert title.strip() == f"({record.size} bytes)"
    documented = [
        (int(offset), int(size), "x" if kind == "-" else TYPES[kind], name)
        for offset, size, kind, name, _ in rows
    ]
    assert documented == members(record, fields._fields)


@pytest.mark.parametrize(("page", "heading", "record", "fields"), RECORDS)
def test_docstring_tables(page: str, heading: str, record: struct.Struct, fields: type) -> None:
    """The table in the class says the same as the page."""
    _, rows = section(page, heading)
    found = re.findall(
        r"^ +(\d+) +(\d+) +(?:([iu]\d+|bytes) +)?(\w+|\(reserved\))", fields.__doc__, re.M
    )
    assert [tuple(row[:4]) for row in rows] == [(a, b, c or "-", d) for a, b, c, d in found]


def test_sections_and_limits_of_the_layer_index() -> None:
    _, rows = section("layer-index.md", "Sections")
    documented = [layout.Section(name, TYPES[t], int(w), items) for name, t, w, items, _ in rows]
    assert tuple(documented) == layout.SECTIONS
    _, rows = section("layer-index.md", "Limits")
    assert {name: int(value) for name, value in rows} == layout.COUNT_MAX


def test_limits_of_erofs() -> None:
    _, rows = section("erofs.md", "What does not fit")
    values = [int(value.split()[0]) for _, value, _ in rows]
    assert values == [
        (1 << 32) - 1,
        erofs_xattr.XATTR_NAME_MAX,
        erofs_xattr.XATTR_VALUE_MAX,
        erofs.XATTR_BODY_MAX,
        layer_index_check.TARGET_MAX,
    ]
    assert erofs.SYMLINK_MAX == layer_index_check.TARGET_MAX
