"""Sparse files in tars: the old GNU format and the three PAX ones (GNU tar manual, appendix D).

Each function returns (bytes that the map itself takes, size of the file, data regions), a region
being (offset in the file, length), in the order of their data in the tar.
"""

from imgsnap.errors import FormatError

RECORD = "sparse file"
BLOCK = 512
REGIONS_MAX = 1 << 20
"""A region costs 24 bytes of map; a file with more holes than this is not a real one."""

SparseMap = tuple[int, int, list[tuple[int, int]]]


def _octal(raw: bytes, offset: int) -> int:
    if raw[0] & 0x80:
        return int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    text = raw.split(b"\0", 1)[0].strip(b" ")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise FormatError(RECORD, "old GNU map", offset, f"{raw!r} is not octal") from None


def _decimal(raw: bytes, field: str, offset: int) -> int:
    if not raw.isdigit() or len(raw) > 19:
        raise FormatError(RECORD, field, offset, f"{raw[:40]!r} is not a number")
    return int(raw)


def gnu_old_map(buffer: memoryview, header: bytes, offset: int) -> SparseMap:
    """Type 'S': four regions at byte 386, isextended at 482, realsize at 483; then blocks of 21."""
    regions: list[tuple[int, int]] = []
    real = _octal(header[483:495], offset + 483)
    table, extended, extra = header[386 : 386 + 4 * 24], header[482], 0
    while True:
        for start in range(0, len(table), 24):
            entry = table[start : start + 24]
            if not entry[0]:
                break
            regions.append((_octal(entry[:12], offset), _octal(entry[12:], offset)))
        if not extended:
            return extra, real, regions
        at = offset + BLOCK + extra
        block = bytes(buffer[at : at + BLOCK])
        if len(block) < BLOCK or len(regions) > REGIONS_MAX:
            raise FormatError(RECORD, "old GNU map", at, "is cut off or too long")
        table, extended, extra = block[: 21 * 24], block[504], extra + BLOCK


def pax_map(records: list[tuple[bytes, bytes]], stored: memoryview, offset: int) -> SparseMap:
    """PAX sparse formats 0.0 (repeated keys), 0.1 (one list) and 1.0 (map before the data)."""
    values = dict(records)
    size = values.get(b"realsize", values.get(b"size"))
    if size is None:
        raise FormatError(RECORD, "GNU.sparse.realsize", offset, "is missing")
    real = _decimal(size, "GNU.sparse.realsize", offset)
    if values.get(b"major") == b"1":
        skip, regions = _map_in_data(stored, offset)
        return skip, real, regions
    if b"map" in values:
        numbers = [_decimal(n, "GNU.sparse.map", offset) for n in values[b"map"].split(b",")]
        if len(numbers) % 2:
            raise FormatError(RECORD, "GNU.sparse.map", offset, "has an odd count")
        return 0, real, list(zip(numbers[::2], numbers[1::2], strict=True))
    offsets = [_decimal(v, "GNU.sparse.offset", offset) for k, v in records if k == b"offset"]
    lengths = [_decimal(v, "GNU.sparse.numbytes", offset) for k, v in records if k == b"numbytes"]
    if len(offsets) != len(lengths):
        raise FormatError(RECORD, "GNU.sparse.offset", offset, "offsets and lengths differ")
    return 0, real, list(zip(offsets, lengths, strict=True))


def _map_in_data(stored: memoryview, offset: int) -> tuple[int, list[tuple[int, int]]]:
    """Format 1.0: decimal lines (count, then offset and length each), padded to a block."""
    position = 0

    def line() -> int:
        nonlocal position
        text = bytes(stored[position : position + 21])
        end = text.find(b"\n")
        if end < 0:
            raise FormatError(RECORD, "map 1.0", offset + position, "no number")
        position += end + 1
        return _decimal(text[:end], "map 1.0", offset + position)

    count = line()
    if count > REGIONS_MAX:
        raise FormatError(RECORD, "map 1.0", offset, f"{count} regions, over {REGIONS_MAX}")
    regions = [(line(), line()) for _ in range(count)]
    return -(-position // BLOCK) * BLOCK, regions
