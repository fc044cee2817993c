"""The fixed layers behind tests/golden; `python -m tests.support.golden` writes the hex files.

Run it only when a format version changes on purpose, and read the difference before committing.
"""

from pathlib import Path

from imgsnap.formats.layer_index import Kind
from imgsnap.formats.layer_index_codec import encode
from tests.support.images import device
from tests.support.layers import (
    Layer,
    Link,
    Node,
    build,
    directory,
    encode_device,
    regular,
    symlink,
)

GOLDEN = Path(__file__).parent.parent / "golden"

LOWER = Layer(
    {
        b"etc": directory(mtime=1_600_000_000),
        b"etc/passwd": regular(b"root:x:0:0\n", mtime=1_600_000_001, nsec=5),
        b"etc/mtab": symlink(b"/proc/mounts"),
        b"old": regular(b"gone"),
    },
    label="lower",
)
UPPER = Layer(
    {
        b"": directory(mode=0o755, uid=7, gid=8, mtime=-1, nsec=999_999_999),
        b"-": Node(Kind.FIFO, 0o600),
        b"bin/tool": regular(
            b"\x7fELF" + bytes(8000),
            mode=0o4755,
            xattrs=((b"security.capability", bytes(range(20))), (b"user.k\xff", b"v")),
        ),
        b"bin/tool2": Link(b"bin/tool"),
        b"dev": directory(),
        b"dev/tty": Node(Kind.CHAR_DEVICE, 0o666, rdev=encode_device(5, 70000)),
        b"dev/sda": Node(Kind.BLOCK_DEVICE, 0o660, gid=3_000_000_000, rdev=encode_device(8, 0)),
        b"etc/issue": Link(b"etc/passwd"),
    },
    whiteouts={b"old", b"etc/mtab"},
    opaque={b"dev"},
    label="upper",
)


def golden_files() -> dict[str, bytes]:
    """The bytes that the files must have, by name."""
    return {
        "layer-index-v1.hex": encode(build(UPPER).index),
        "erofs-v1.hex": device([LOWER, UPPER]),
    }


def read_golden(name: str) -> bytes:
    lines = (GOLDEN / name).read_text().splitlines()
    data = bytearray()
    for line in lines:
        offset, _, digits = line.partition(": ")
        data += bytes(int(offset, 16) - len(data))  # left out: zeros
        data += bytes.fromhex(digits)
    return bytes(data)


def dump(data: bytes) -> str:
    """Lines of offset and 16 bytes; lines of zeros are left out, except the last."""
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if any(row) or at + 16 >= len(data):
            lines.append(f"{at:08x}: {row.hex()}\n")
    return "".join(lines)


if __name__ == "__main__":
    for name, data in golden_files().items():
        (GOLDEN / name).write_text(dump(data))
