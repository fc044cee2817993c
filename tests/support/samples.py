"""Layer tars that several tests share: small, varied, the same on every run."""

import random
import tarfile
from pathlib import Path

from tests.support.tars import Item, layer_tar

DIR, LINK, SYM = tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
BUSYBOX = Path("/bin/busybox")


def noise(size: int, seed: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def base_tar(size: int = 300_000) -> bytes:
    """A lower layer with one file of `size` incompressible bytes."""
    return layer_tar(
        [
            Item(b"etc", DIR, mode=0o755),
            Item(b"etc/hosts", content=b"127.0.0.1 localhost\n"),
            Item(b"etc/gone", content=b"hidden by the upper layer\n"),
            Item(b"usr", DIR, mode=0o755, mtime="1700000000.123456789"),
            Item(b"usr/noise", content=noise(size, 1), mode=0o755, uid=1000, gid=70000),
            Item(b"usr/zeros", content=bytes(800_000)),
            Item(b"usr/text", content=b"line\n" * 20_000, xattrs={b"user.note": b"\0\xff"}),
            Item(b"lib", SYM, mode=0o777, link=b"usr"),
            Item("naïve".encode(), content=b"a name of two encodings"),
            Item(b"\xff\xfe", content=b"a name of none"),
        ]
    )


def top_tar(label: bytes = b"top") -> bytes:
    """An upper layer: whiteout, link into the lower layer, replaced and new files."""
    return layer_tar(
        [
            Item(b"etc/.wh.gone"),
            Item(b"etc/hosts", content=b"replaced by " + label + b"\n"),
            Item(b"usr/linked", LINK, link=b"usr/text"),
            Item(b"srv", DIR, mode=0o1777),
            Item(b"srv/" + label, content=label * 3000, mtime="-5.5"),
        ]
    )


def program_tar() -> bytes:
    """A root file system in which programs run."""
    applets = [b"sh", b"cat", b"echo", b"id", b"pwd", b"env", b"touch", b"ls", b"sleep", b"kill"]
    return layer_tar(
        [
            *(Item(n, DIR, mode=0o755) for n in (b"bin", b"etc", b"home", b"home/app", b"proc")),
            *(Item(n, DIR, mode=0o755) for n in (b"dev", b"sys", b"work")),
            Item(b"tmp", DIR, mode=0o1777),
            Item(b"bin/busybox", content=BUSYBOX.read_bytes(), mode=0o755),
            *(Item(b"bin/" + n, SYM, mode=0o777, link=b"busybox") for n in applets),
            Item(
                b"etc/passwd",
                content=b"root:x:0:0::/root:/bin/sh\napp:x:1234:2345::/home/app:/bin/sh\n",
            ),
            Item(b"etc/group", content=b"root:x:0:\napp:x:2345:\nextra:x:3456:app\n"),
        ]
    )


def many_files(count: int = 40, size: int = 60_000) -> bytes:
    """A layer of files f00, f01, ... of which each has its own noise."""
    return layer_tar([Item(b"f%02d" % n, content=noise(size, n)) for n in range(count)])
