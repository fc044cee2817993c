"""Layer tars for tests: well-formed ones through tarfile, malformed ones header by header."""

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK = 512


@dataclass(frozen=True)
class Item:
    """One entry; `kind` is a tarfile type byte."""

    path: bytes
    kind: bytes = tarfile.REGTYPE
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: str = "0"  # decimal, as PAX has it
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def pax_record(keyword: bytes, value: bytes) -> bytes:
    body = b" " + keyword + b"=" + value + b"\n"
    length = len(body)
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def header(
    name: bytes = b"f",
    *,
    size: int | bytes = 0,
    kind: bytes = b"0",
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: bytes = b"0000000\0",
    minor: bytes = b"0000000\0",
    prefix: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """One 512-byte header with a right checksum; fields are raw so that tests can break them."""
    size_field = size if isinstance(size, bytes) else b"%011o\0" % size
    raw = (
        name[:100].ljust(100, b"\0")
        + mode
        + uid
        + gid
        + size_field
        + mtime
        + b" " * 8
        + kind
        + link[:100].ljust(100, b"\0")
        + magic
        + bytes(64)
        + major
        + minor
        + prefix.ljust(155, b"\0")
    ).ljust(BLOCK, b"\0")
    if tail:
        raw = (raw[: BLOCK - len(tail)] + tail)[:BLOCK]
    return raw[:148] + b"%06o\0 " % sum(raw) + raw[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def pax(records: Iterable[tuple[bytes, bytes]], kind: bytes = b"x") -> bytes:
    body = b"".join(pax_record(*record) for record in records)
    return header(b"PaxHeader", size=len(body), kind=kind) + padded(body)


def end() -> bytes:
    return bytes(2 * BLOCK)


def raw_item(item: Item) -> bytes:
    """An entry with every value in PAX records, so that nothing is rounded or re-encoded."""
    records = [
        (b"path", item.path),
        (b"uid", str(item.uid).encode()),
        (b"gid", str(item.gid).encode()),
        (b"mtime", item.mtime.encode()),
    ]
    if item.link:
        records.append((b"linkpath", item.link))
    records += [(b"SCHILY.xattr." + name, value) for name, value in item.xattrs.items()]
    content = item.content if item.kind == tarfile.REGTYPE else b""
    return (
        pax(records)
        + header(
            b"name",
            size=len(content),
            kind=item.kind,
            mode=b"%07o\0" % item.mode,
            major=b"%07o\0" % item.device[0],
            minor=b"%07o\0" % item.device[1],
        )
        + padded(content)
    )


def layer_tar(items: Iterable[Item]) -> bytes:
    return b"".join(raw_item(item) for item in items) + end()


def tarfile_tar(
    infos: Iterable[tuple[tarfile.TarInfo, bytes]], fmt: int = tarfile.GNU_FORMAT
) -> bytes:
    """The same through Python's writer, for its dialects (GNU long names, ustar prefixes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt, errors="surrogateescape") as tar:
        for info, content in infos:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()
