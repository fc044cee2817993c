"""docs/format.md gives the offsets that the code has, for the records that are defined there."""

import re
import struct
from pathlib import Path

import pytest

from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import FOOTER
from imgsnap.formats import chunk_map_codec
from imgsnap.formats.rules import Rules

PAGE = (Path(__file__).parent.parent.parent / "docs/format.md").read_text()


def documented(heading: str) -> list[tuple[int, int]]:
    """(offset, size) of each row of the table below a heading."""
    found = re.search(rf"^### {heading}$(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert found, heading
    rows = re.findall(r"^\| (\d+) \| (\d+) \|", found[1], re.M)
    return [(int(offset), int(size)) for offset, size in rows]


def actual(record: struct.Struct) -> list[tuple[int, int]]:
    found, offset = [], 0
    for digits, code in re.findall(r"(\d*)([a-zA-Z])", record.format):
        repeat = int(digits or 1)
        sizes = [repeat] if code in "sx" else [struct.calcsize("<" + code)] * repeat
        for size in sizes:
            found.append((offset, size))
            offset += size
    assert offset == record.size
    return found


@pytest.mark.parametrize(
    ("heading", "record"),
    [
        ("Chunk map header", chunk_map_codec.Header.STRUCT),
        ("Chunk map extent record", chunk_map_codec._EXTENT),
        ("Chunk map pack record", chunk_map_codec._PACK),
        ("Presence map", PresenceHeader.STRUCT),
        ("Metadata footer", FOOTER),
    ],
)
def test_offset_tables(heading: str, record: struct.Struct) -> None:
    assert documented(heading) == actual(record)


def test_the_rules_text_is_the_default_one() -> None:
    assert f"    {Rules().text}\n" in PAGE


def test_limits_in_the_chunk_map_table() -> None:
    limits = re.findall(r"at most (\d+)", PAGE)
    assert {str(chunk_map_codec.EXTENTS_MAX), str(chunk_map_codec.PACKS_MAX)} <= set(limits)
