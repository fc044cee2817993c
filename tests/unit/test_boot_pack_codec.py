"""Boot pack and trace: golden bytes, the documented offsets, hostile bytes, and what makes them."""

import json
import random
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.blockstore.touches import TouchLog
from imgsnap.convert.boot_pack import plan
from imgsnap.errors import FormatError, ImgsnapError, UnsupportedFormat
from imgsnap.formats import boot_pack
from imgsnap.formats.block_tree import cover
from imgsnap.formats.boot_pack import BootExtent, BootFrame, BootTable, Header, Run
from imgsnap.formats.frame import decompress
from imgsnap.formats.trace import TRACE_SIZE_MAX, Touch, Trace, merged, parse_trace
from imgsnap.units import BLOCK_SIZE

PAGE = (Path(__file__).parents[2] / "docs/format/boot-pack.md").read_text()


def table() -> BootTable:
    extents = (
        BootExtent("aa" * 32, 100, (b"p" * 32, b"q" * 32)),
        BootExtent("bb" * 32, 3, ()),
    )
    first = (Run(0, 4, 4), Run(1, 0, 3))
    second = (Run(0, 99, 1),)
    nodes = [bytes([n]) * 32 for n in range(4)]
    return BootTable(
        extents, (BootFrame(50, first, tuple(nodes[:3])), BootFrame(9, second, (nodes[3],)))
    )


HEADER = "494d47534e504250" "0100" "01" "00" + "00000000" * 3 + (
    "02000000" "02000000" "03000000" "04000000" "02000000"
)  # fmt: skip
CONTENT = (
    "aa" * 32 + "64000000" "02000000" + "bb" * 32 + "03000000" "00000000"
    "32000000" "02000000" "09000000" "01000000"
    "04000000" "0400" "0000" "00000000" "0300" "0100" "63000000" "0100" "0000"
    + "00" * 32 + "01" * 32 + "02" * 32 + "03" * 32 + "70" * 32 + "71" * 32
)  # fmt: skip
"""Written by hand from docs/format/boot-pack.md."""


def decode(raw: bytes) -> BootTable:
    header = Header.parse(raw)
    return boot_pack.decode_table(header, raw[Header.SIZE : Header.SIZE + header.table_length])


def test_golden_bytes() -> None:
    raw = boot_pack.encode(table())
    assert raw[:44].hex() == HEADER
    content = decompress(raw[Header.SIZE :], size_max=1 << 20, record="table")
    assert content.hex() == CONTENT
    assert Header.parse(raw).table_length == len(raw) - Header.SIZE
    assert decode(raw) == table()
    assert (table().blocks, table().frames_length) == (8, 59)


def documented(heading: str) -> list[tuple[int, int]]:
    found = re.search(rf"^## {heading}$(.*?)(?=^#|\Z)", PAGE, re.M | re.S)
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
    return found


@pytest.mark.parametrize(
    ("heading", "record"),
    [
        ("Header", Header.STRUCT),
        ("Extent record", boot_pack._EXTENT),
        ("Frame record", boot_pack._FRAME),
        ("Run record", boot_pack._RUN),
    ],
)
def test_offset_tables(heading: str, record: struct.Struct) -> None:
    assert documented(heading) == actual(record)


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        ([Run(0, 4, 4), Run(0, 7, 1)], "overlaps"),
        ([Run(0, 99, 2)], "outside"),
        ([Run(2, 0, 1)], "no extent"),
        ([], "blocks"),
        ([Run(0, 0, 0)], "blocks"),
    ],
)
def test_runs_that_make_no_sense(runs: list[Run], problem: str) -> None:
    nodes = tuple(bytes(32) for run in runs for _ in cover(run.first, run.blocks))
    frame = BootFrame(10, tuple(runs), nodes)
    raw = boot_pack.encode(BootTable(table().extents, (frame,)))
    with pytest.raises(FormatError, match=problem):
        decode(raw)


def test_other_refusals() -> None:
    for frames, problem in (
        ((BootFrame(0, (Run(0, 0, 1),), (bytes(32),)),), "length"),
        ((BootFrame(1 << 20, (Run(0, 0, 1),), (bytes(32),)),), "length"),
        ((BootFrame(9, (Run(0, 0, 1),), (bytes(32), bytes(32))),), "exactly"),
    ):
        with pytest.raises(FormatError, match=problem):
            decode(boot_pack.encode(BootTable(table().extents, frames)))
    twice = BootTable((table().extents[1], table().extents[1]), ())
    with pytest.raises(FormatError, match="twice"):
        decode(boot_pack.encode(twice))
    for offset, value in ((8, 9), (20, 1)):
        raw = bytearray(boot_pack.encode(table()))
        raw[offset] = value
        with pytest.raises(UnsupportedFormat):
            decode(bytes(raw))
    for offset in range(24, 48, 4):  # a count of 2^32 - 1 is refused before anything is allocated
        raw = bytearray(boot_pack.encode(table()))
        raw[offset : offset + 4] = b"\xff" * 4
        with pytest.raises(FormatError, match="over"):
            decode(bytes(raw))


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5), st.integers(0, 9))
def test_damaged_tables_end_in_a_named_error(flips: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(boot_pack.encode(table()))
    for position, value in flips:
        raw[position % len(raw)] = value
    try:
        found = decode(bytes(raw[: len(raw) - cut]))
    except ImgsnapError:
        return
    for frame in found.frames:
        assert len(frame.nodes) == sum(1 for r in frame.runs for _ in cover(r.first, r.blocks))


@given(st.binary(max_size=300))
def test_noise_is_no_pack(raw: bytes) -> None:
    with pytest.raises(ImgsnapError):
        decode(raw)


# Traces -----------------------------------------------------------------------------------------

TRACE = Trace(("aa" * 32, "bb" * 32), (Touch(1, 7, 2), Touch(0, 0, 1)), complete=False)


def test_a_trace_round_trips() -> None:
    assert parse_trace(TRACE.to_json()) == TRACE
    value = json.loads(TRACE.to_json())
    assert set(value) == {"format", "complete", "extents", "touches"}  # ids and numbers only


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", {"name": "something", "version": 1}),
        ("format", None),
        ("complete", 1),
        ("extents", ["aa"]),
        ("extents", ["AA" * 32]),
        ("extents", "aa" * 32),
        ("extents", ["aa" * 32] * 1025),
        ("touches", [[2, 0, 1]]),
        ("touches", [[0, -1, 1]]),
        ("touches", [[0, 0, 0]]),
        ("touches", [[0, 1 << 32, 1]]),
        ("touches", [[0, (1 << 32) - 1, 2]]),
        ("touches", [[0, 0]]),
        ("touches", [[0, True, 1]]),
        ("touches", [[0, 0, 1.5]]),
        ("touches", {}),
    ],
)
def test_traces_that_are_refused(field: str, value: object) -> None:
    document = json.loads(TRACE.to_json()) | {field: value}
    with pytest.raises(FormatError):
        parse_trace(json.dumps(document).encode())


def test_other_traces_that_are_refused() -> None:
    newer = json.loads(TRACE.to_json()) | {"format": {"name": "imgsnap trace", "version": 2}}
    with pytest.raises(UnsupportedFormat):
        parse_trace(json.dumps(newer).encode())
    for raw in (b"", b"[]", b"[" * 100_000, b"\xff", bytes(TRACE_SIZE_MAX + 1)):
        with pytest.raises(FormatError):
            parse_trace(raw)


@given(st.binary(max_size=200))
def test_noise_is_no_trace(raw: bytes) -> None:
    with pytest.raises(ImgsnapError):
        parse_trace(raw)


def test_traces_are_merged_by_their_earliest_reads() -> None:
    extents = ("aa" * 32, "bb" * 32)
    one = Trace(extents, (Touch(0, 0, 3), Touch(1, 9, 1)))
    two = Trace(tuple(reversed(extents)), (Touch(0, 9, 1), Touch(1, 2, 1), Touch(1, 50, 1)))
    a, b = extents
    assert list(merged([one], 100)) == [(a, 0), (a, 1), (a, 2), (b, 9)]
    assert list(merged([one, two], 100)) == [(a, 0), (b, 9), (a, 1), (a, 2), (a, 50)]
    assert list(merged([one, two], 3)) == [(a, 0), (b, 9), (a, 1)]
    huge = Trace(extents, (Touch(0, 0, 1 << 31), Touch(1, 0, 1 << 31)))
    assert len(list(merged([huge, huge], 1000))) == 1000


def test_the_plan_keeps_the_order_from_frame_to_frame() -> None:
    order = [("a", 9), ("a", 8), ("b", 1), ("a", 1), ("a", 7), ("a", 2)]
    assert plan(order, 3) == [
        [(("a", 8), 2), (("b", 1), 1)],
        [(("a", 1), 2), (("a", 7), 1)],
    ]


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 150)), max_size=30))
def test_the_touch_log_against_a_set(reads: list[tuple[int, int]]) -> None:
    log = TouchLog()
    expected: dict[int, None] = {}
    for first, count in reads:
        slack = random.Random(first).randrange(BLOCK_SIZE)
        log.note(first * BLOCK_SIZE + slack % 7, count * BLOCK_SIZE - slack)
        expected.update(dict.fromkeys(range(first, first + count)))
    found = [block for first, count in log.runs() for block in range(first, first + count)]
    assert len(found) == len(set(found))
    # Up to its last block, which a read may end before, the log says what the set does.
    assert set(found) <= set(expected)
    touched = {block for first, count in reads for block in range(first, _end(first, count))}
    assert set(found) == touched


def _end(first: int, count: int) -> int:
    slack = random.Random(first).randrange(BLOCK_SIZE)
    end = first * BLOCK_SIZE + slack % 7 + count * BLOCK_SIZE - slack
    return -(-end // BLOCK_SIZE)


def test_the_touch_log_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgsnap.blockstore.touches.BLOCKS_MAX", 5)
    log = TouchLog()
    for block in range(0, 40, 2):
        log.note(block * BLOCK_SIZE, BLOCK_SIZE)
    assert log.full and [first for first, _ in log.runs()] == [0, 2, 4, 6, 8]
