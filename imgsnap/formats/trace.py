"""The trace of a start: which blocks were read, in the order of their first reads.

JSON, made by the loader and read by `imgsnap optimize`. It names extents by their ids and blocks by
their numbers, and nothing else: no paths, no arguments, no times. See docs/format/boot-pack.md.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from imgsnap.errors import FormatError
from imgsnap.formats.features import check_version

RECORD = "trace"
VERSION = 1
EXTENTS_MAX = 1024
TOUCHES_MAX = 1 << 18
"""Runs of blocks in one trace: 1 GiB when every one is a single block."""
TRACE_SIZE_MAX = 16 << 20
BLOCK_MAX = (1 << 32) - 1
_EXTENT_ID_DIGITS = 64


class Touch(NamedTuple):
    """Blocks [first, first + blocks) of an extent, by its number in the trace."""

    extent: int
    first: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Trace:
    """First reads, in order. `complete` is False when the recorder was full before the end."""

    extents: tuple[str, ...]  # extent ids
    touches: tuple[Touch, ...]
    complete: bool = True

    @property
    def blocks(self) -> int:
        return sum(touch.blocks for touch in self.touches)

    def to_json(self) -> bytes:
        value = {
            "format": {"name": "imgsnap trace", "version": VERSION},
            "complete": self.complete,
            "extents": list(self.extents),
            "touches": [list(touch) for touch in self.touches],
        }
        return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def parse_trace(raw: bytes) -> Trace:
    """The value of a trace. Raises FormatError or UnsupportedFormat."""
    if len(raw) > TRACE_SIZE_MAX:
        raise FormatError(RECORD, "length", 0, f"{len(raw)} bytes is over {TRACE_SIZE_MAX}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(RECORD, "JSON", 0, str(error)[:200]) from error
    if not isinstance(value, dict):
        raise FormatError(RECORD, "JSON", 0, "is not an object")
    form = value.get("format")
    if not isinstance(form, dict) or form.get("name") != "imgsnap trace":
        raise FormatError(RECORD, "format", 0, "is not that of a trace")
    check_version(RECORD, _integer(form.get("version"), "format.version", 1 << 16), VERSION)
    complete = value.get("complete")
    if not isinstance(complete, bool):
        raise FormatError(RECORD, "complete", 0, "is neither true nor false")
    extents = tuple(_extent_id(item) for item in _list(value, "extents", EXTENTS_MAX))
    touches = tuple(_touch(item, extents) for item in _list(value, "touches", TOUCHES_MAX))
    return Trace(extents, touches, complete)


def _list(value: dict[str, Any], field: str, maximum: int) -> list[Any]:
    items = value.get(field)
    if not isinstance(items, list) or len(items) > maximum:
        raise FormatError(RECORD, field, 0, f"is not a list of at most {maximum}")
    return items


def _integer(value: object, field: str, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise FormatError(RECORD, field, 0, f"{str(value)[:40]} is not from 0 to {maximum}")
    return value


def _extent_id(value: object) -> str:
    if (
        not isinstance(value, str)
        or len(value) != _EXTENT_ID_DIGITS
        or not set(value) <= set("0123456789abcdef")
    ):
        raise FormatError(RECORD, "extents", 0, f"{str(value)[:80]!r} is not an extent id")
    return value


def _touch(value: object, extents: tuple[str, ...]) -> Touch:
    if not isinstance(value, list) or len(value) != len(Touch._fields):
        raise FormatError(RECORD, "touches", 0, f"{str(value)[:80]} is not a triple")
    extent = _integer(value[0], "touches.extent", len(extents) - 1)
    block = _integer(value[1], "touches.first", BLOCK_MAX)
    count = _integer(value[2], "touches.blocks", BLOCK_MAX - block)
    if not count:
        raise FormatError(RECORD, "touches.blocks", 0, "is 0")
    return Touch(extent, block, count)


def merged(traces: Iterable[Trace], blocks_max: int) -> Iterator[tuple[str, int]]:
    """(extent id, block) of all traces, each once, at most `blocks_max`.

    Ordered by how early a block comes in the trace where it comes earliest: several starts
    progress side by side.
    """
    rank: dict[tuple[str, int], int] = {}
    for trace in traces:
        position = 0
        for extent, block, count in trace.touches:
            for number in range(block, block + min(count, blocks_max)):
                key = (trace.extents[extent], number)
                if position < rank.get(key, blocks_max):
                    rank[key] = position
                position += 1
            if position >= blocks_max:
                break
    for number, key in enumerate(sorted(rank, key=rank.__getitem__)):
        if number == blocks_max:
            return
        yield key
