"""docs/format.md gives the offsets that the code has, for the records that are defined there."""

import re
import struct
import zlib
from pathlib import Path

import pytest
from blake3 import blake3

from imgsnap.blockstore.direct import VerifiedMarker
from imgsnap.blockstore.extent_cache import PresenceHeader
from imgsnap.blockstore.node_cache import FOOTER, NodeCache
from imgsnap.digest import sha256_digest
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
        ("Cache footer", FOOTER),
        ("Verified marker", VerifiedMarker.STRUCT),
    ],
)
def test_offset_tables(heading: str, record: struct.Struct) -> None:
    assert documented(heading) == actual(record)


def test_the_rules_text_is_the_default_one() -> None:
    assert f"    {Rules().text}\n" in PAGE


def test_limits_in_the_chunk_map_table() -> None:
    limits = re.findall(r"at most (\d+)", PAGE)
    assert {str(chunk_map_codec.EXTENTS_MAX), str(chunk_map_codec.PACKS_MAX)} <= set(limits)


def test_golden_bytes_of_the_cache_records(tmp_path: Path) -> None:
    """Written by hand from the page."""
    header = PresenceHeader(chunk_count=3, total_blocks=70, extent_id="ab" * 32)
    body = "494d47534e505052" + "01000000" + "03000000" + "46000000" + "ab" * 32 + "00" * 8
    crc = zlib.crc32(bytes.fromhex(body)).to_bytes(4, "little").hex()
    assert header.pack().hex() == body + crc
    assert PresenceHeader.parse(bytes.fromhex(body + crc)) == header

    region = bytes(4096)
    digest = sha256_digest(region)
    NodeCache(tmp_path).store_metadata(digest, region).close()
    (file,) = tmp_path.glob("*/metadata/*")
    footer = (
        blake3(bytes.fromhex(digest[7:]) + region).hexdigest() + "0010000000000000" + b"ISDC".hex()
    )
    crc = zlib.crc32(bytes.fromhex(footer)).to_bytes(4, "little").hex()
    assert file.read_bytes()[4096:].hex() == footer + crc
