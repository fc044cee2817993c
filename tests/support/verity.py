"""A hash tree made the simple way, for judging ours: all in memory, level by level."""

import hashlib

BLOCK = 4096


def naive_area(hashes: list[bytes], uuid: bytes) -> tuple[bytes, str]:
    """The area behind a device whose blocks have these SHA-256 sums, and the root hash."""
    levels = []
    row = hashes
    while len(row) > 1:
        raw = b"".join(row)
        raw += bytes(-len(raw) % BLOCK)
        levels.append(raw)
        row = [hashlib.sha256(raw[n : n + BLOCK]).digest() for n in range(0, len(raw), BLOCK)]
    head = b"verity\0\0" + (1).to_bytes(4, "little") + (1).to_bytes(4, "little") + uuid
    head += b"sha256".ljust(32, b"\0") + (BLOCK).to_bytes(4, "little") * 2
    head += len(hashes).to_bytes(8, "little")
    return head.ljust(BLOCK, b"\0") + b"".join(reversed(levels)), row[0].hex()


def naive_tree(device: bytes, uuid: bytes) -> tuple[bytes, str]:
    """The area of a device, and its root hash."""
    at = range(0, len(device), BLOCK)
    return naive_area([hashlib.sha256(device[n : n + BLOCK]).digest() for n in at], uuid)
