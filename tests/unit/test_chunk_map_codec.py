"""The chunk map: golden bytes, round trips, and damage that ends in a named error."""

from array import array
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.digest import Digest
from imgsnap.errors import FormatError, ImgsnapError, UnsupportedFormat
from imgsnap.formats.chunk_map import ZERO_PACK, ChunkMap, Extent, PackRef
from imgsnap.formats.chunk_map_codec import decode, encode


def digest(byte: int) -> Digest:
    return Digest("sha256:" + f"{byte:02x}" * 32)


def sample() -> ChunkMap:
    ids = b"\x11" * 32 + b"\x22" * 32 + b"\x33" * 32
    extent = Extent(
        digest(0xAA),
        70,
        b"\x44" * 32,
        ids,
        array("H", [64, 5, 1]),
        array("H", [0, ZERO_PACK, 1]),
        array("I", [0, 0, 7]),
        array("I", [100, 0, 50]),
    )
    empty = Extent(digest(0xBB), 0, bytes(32), b"", array("H"), array("H"), array("I"), array("I"))
    return ChunkMap((PackRef(digest(0xCC), 100), PackRef(digest(0xDD), 57)), (extent, empty))


GOLDEN = (
    "494d47534e50434d" "0200" "01" "00" "00000000" "00000000" "00000000"
    "02000000" "02000000" "03000000" + "00" * 28
    + "aa" * 32 + "46000000" "03000000" + "44" * 32 + "00" * 8
    + "bb" * 32 + "00000000" "00000000" + "00" * 32 + "00" * 8
    + "cc" * 32 + "6400000000000000"
    + "dd" * 32 + "3900000000000000"
    + "11" * 32 + "22" * 32 + "33" * 32
    + "4000" "0500" "0100"
    + "0000" "ffff" "0100"
    + "00000000" "00000000" "07000000"
    + "64000000" "00000000" "32000000"
)  # fmt: skip
"""Written by hand from docs/format.md."""


def test_golden_bytes() -> None:
    assert encode(sample()).hex() == GOLDEN
    assert decode(bytes.fromhex(GOLDEN)) == sample()


def test_places() -> None:
    chunk_map = sample()
    extent = chunk_map.extents[0]
    assert chunk_map.place(extent, 1) is None
    place = chunk_map.place(extent, 2)
    assert place is not None
    assert (place.pack.digest, place.offset, place.length) == (digest(0xDD), 7, 50)


def test_the_extent_id_covers_the_pure_columns_only() -> None:
    extent = sample().extents[0]
    assert extent.id == replace(extent, offset=array("I", [1, 0, 2])).id
    assert extent.id != replace(extent, blocks=array("H", [63, 6, 1])).id
    assert extent.id != replace(extent, ids=extent.ids[:-1] + b"\0").id
    assert extent.id != replace(extent, block_root=bytes(32)).id


@pytest.mark.parametrize(
    ("offset", "value", "problem"),
    [
        (0, b"X", "magic"),
        (10, b"\x02", "hash_algorithm"),
        (24, b"\xff\xff", "extent_count"),
        (28, b"\0\0\1", "pack_count"),
        (32, b"\0\0\0\x02", "chunk_count"),
        (64 + 32, b"\x47", "cover"),
        (224 + 32, b"\0" * 8, "size"),
    ],
)
def test_refused(offset: int, value: bytes, problem: str) -> None:
    raw = bytearray.fromhex(GOLDEN)
    raw[offset : offset + len(value)] = value
    with pytest.raises(FormatError, match=problem):
        decode(bytes(raw))


def test_newer_versions_and_unknown_features() -> None:
    for offset in (8, 20):
        raw = bytearray.fromhex(GOLDEN)
        raw[offset] = 9
        with pytest.raises(UnsupportedFormat):
            decode(bytes(raw))
    for offset in (12, 16):  # compat and ro_compat bits do not stop a reader
        raw = bytearray.fromhex(GOLDEN)
        raw[offset] = 9
        assert decode(bytes(raw)) == sample()


@given(
    st.integers(0, 400), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6)
)
def test_damage_ends_in_a_named_error(cut: int, flips: list[tuple[int, int]]) -> None:
    raw = bytearray.fromhex(GOLDEN)
    for position, value in flips:
        raw[position % len(raw)] = value
    try:
        chunk_map = decode(bytes(raw[: max(0, len(raw) - cut)]))
    except ImgsnapError:
        return
    for extent in chunk_map.extents:
        for row in range(len(extent)):
            place = chunk_map.place(extent, row)
            assert place is None or place.offset + place.length <= place.pack.size
