"""CRC-32C (Castagnoli) for headers of a few KiB; content is covered by digests, not by this."""

_POLYNOMIAL = 0x82F63B78  # reflected


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_TABLE = _table()


def crc32c_raw(data: bytes | bytearray | memoryview, state: int = 0xFFFFFFFF) -> int:
    """The register after `data`, without the final inversion; Linux's crc32c(~0, data)."""
    table = _TABLE
    for byte in data:
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """The usual CRC-32C: initial value and final exclusive-or are all ones."""
    return crc32c_raw(data) ^ 0xFFFFFFFF
