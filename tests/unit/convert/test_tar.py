"""The tar reader: dialects it must understand, and input it must refuse by name."""

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.convert.limits import Limits
from imgsnap.convert.tar import HARD_LINK, TarReader
from imgsnap.errors import FormatError, ImgsnapError, LimitExceeded, Unsupported
from imgsnap.formats.layer_index import Kind
from tests.support.tars import Item, end, header, layer_tar, padded, pax, tarfile_tar


def entries(raw: bytes, limits: Limits | None = None, **options):
    return list(TarReader(memoryview(raw), limits or Limits(), **options))


def content(raw: bytes, entry) -> bytes:
    out = bytearray(entry.size)
    for start, place, length in entry.segments:
        out[start : start + length] = raw[place : place + length]
    return bytes(out)


def test_every_kind_and_value():
    raw = layer_tar(
        [
            Item(b"d", tarfile.DIRTYPE, mode=0o1777, uid=3_000_000, gid=70_000, mtime="-5.5"),
            Item(b"d/f", content=b"x" * 513, mode=0o4755, mtime="1700000000.123456789"),
            Item(b"d/hard", tarfile.LNKTYPE, link=b"./d/f"),
            Item(b"d/soft", tarfile.SYMTYPE, link=b"../a//b"),
            Item(b"c", tarfile.CHRTYPE, device=(1, 70_000)),
            Item(b"b", tarfile.BLKTYPE, device=(8, 1)),
            Item(b"p", tarfile.FIFOTYPE),
            Item(
                b"x", content=b"1", xattrs={b"user.a": b"\0\n=\xff", b"security.capability": b"c"}
            ),
        ]
    )
    d, f, hard, soft, c, b, p, x = entries(raw)
    assert (d.kind, d.mode, d.uid, d.gid) == (Kind.DIRECTORY, 0o1777, 3_000_000, 70_000)
    assert (d.mtime, d.nsec) == (-6, 500_000_000)
    assert (f.kind, f.mode, f.mtime, f.nsec) == (Kind.FILE, 0o4755, 1_700_000_000, 123_456_789)
    assert content(raw, f) == b"x" * 513
    assert (hard.kind, hard.link, hard.size) == (HARD_LINK, b"d/f", 0)
    assert (soft.kind, soft.link) == (Kind.SYMLINK, b"../a//b")
    assert (c.kind, c.major, c.minor) == (Kind.CHAR_DEVICE, 1, 70_000)
    assert (b.kind, p.kind) == (Kind.BLOCK_DEVICE, Kind.FIFO)
    assert x.xattrs == ((b"security.capability", b"c"), (b"user.a", b"\0\n=\xff"))


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_dialects_of_pythons_writer(fmt):
    long = "a" * 90 + "/" + "b" * 60
    info = tarfile.TarInfo(long)
    link = tarfile.TarInfo("s")
    link.type, link.linkname = tarfile.SYMTYPE, "t" * (100 if fmt == tarfile.USTAR_FORMAT else 300)
    raw = tarfile_tar([(info, b"hello"), (link, b"")], fmt)
    first, second = entries(raw)
    assert first.path == long.encode()
    assert content(raw, first) == b"hello"
    assert second.link == link.linkname.encode()


def test_base256_numbers():
    raw = header(b"f", uid=b"\x80\0\0\0\xb2\xd0\x5e\0", mtime=b"\xff" * 11 + b"\xfe") + end()
    (entry,) = entries(raw)
    assert entry.uid == 3_000_000_000
    assert entry.mtime == -2


def test_global_header_applies_until_overridden():
    raw = pax([(b"uid", b"7"), (b"gid", b"8")], b"g") + header(b"a")
    raw += pax([(b"uid", b"9")]) + header(b"b") + end()
    a, b = entries(raw)
    assert (a.uid, a.gid, b.uid, b.gid) == (7, 8, 9, 8)


def test_old_directories_end_in_a_slash_and_end_blocks_may_be_missing():
    assert entries(header(b"d/", kind=b"\0", magic=bytes(8)))[0].kind == Kind.DIRECTORY
    assert entries(b"") == []


def test_old_gnu_sparse():
    extra = b"%011o\0%011o\0" % (8192, 4) + bytes(20 * 24)
    head = header(
        b"s",
        size=8,
        kind=b"S",
        magic=b"ustar  \0",
    )
    regions = b"".join(b"%011o\0%011o\0" % r for r in [(512, 1), (1024, 1), (2048, 1), (4096, 1)])
    raw = bytearray(head)
    raw[386 : 386 + 96] = regions
    raw[482] = 1
    raw[483:495] = b"%011o\0" % 10_000
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    data = bytes(raw) + padded(extra + b"\0" * (504 - len(extra))) + padded(b"abcdWXYZ") + end()
    (entry,) = entries(data)
    assert entry.size == 10_000
    body = content(data, entry)
    assert (body[512:513], body[4096:4097], body[8192:8196]) == (b"a", b"d", b"WXYZ")
    assert body.count(0) == 10_000 - 8


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_pax_sparse(version):
    name, real = b"real-name", b"20000"
    if version == "0.0":
        records = [(b"GNU.sparse.size", real), (b"GNU.sparse.numblocks", b"2")]
        for offset, length in ((4096, 3), (10_000, 2)):
            records.append((b"GNU.sparse.offset", b"%d" % offset))
            records.append((b"GNU.sparse.numbytes", b"%d" % length))
        stored = b"abcde"
    elif version == "0.1":
        records = [(b"GNU.sparse.size", real), (b"GNU.sparse.map", b"4096,3,10000,2")]
        stored = b"abcde"
    else:
        records = [
            (b"GNU.sparse.major", b"1"),
            (b"GNU.sparse.minor", b"0"),
            (b"GNU.sparse.realsize", real),
        ]
        stored = padded(b"2\n4096\n3\n10000\n2\n") + b"abcde"
    records.append((b"GNU.sparse.name", name))
    raw = pax(records) + header(b"GNUSparseFile.0/x", size=len(stored)) + padded(stored) + end()
    (entry,) = entries(raw)
    assert (entry.path, entry.size) == (name, 20_000)
    body = content(raw, entry)
    assert (body[4096:4099], body[10_000:10_002]) == (b"abc", b"de")
    assert body.count(0) == 20_000 - 5


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (header(b"a/../b") + end(), "holds '..'"),
        (header(b"/etc/passwd") + end(), "absolute"),
        (header(b"h", kind=b"1", link=b"../../x") + end(), "holds '..'"),
        (pax([(b"path", b"x" * 5000)]) + header() + end(), "over 4096"),
        (pax([(b"path", b"d/" + b"x" * 256)]) + header() + end(), "over 255"),
        (pax([(b"path", b"a\0b")]) + header() + end(), "NUL"),
        (header(b"f", size=100), "cut off"),
        (header(b"f")[:300], "cut off"),
        (pax([(b"path", b"x")]) + end(), "extension header without entry"),
        (header(b"f", size=b"zzzzzzzzzzz\0") + end(), "not octal"),
        (header(b"f", size=b"\xff" * 12) + end(), "cut off"),
        (pax([(b"size", b"-1")]) + header() + end(), "not a number"),
        (pax([(b"uid", b"99999999999")]) + header() + end(), "32 bits"),
        (pax([(b"mtime", b"1e5")]) + header() + end(), "not a time"),
        (header(b"x", size=3, kind=b"x") + padded(b"9 a") + header() + end(), "does not fit"),
        (header(b"x", size=3, kind=b"x") + padded(b"abc") + header() + end(), "not a number"),
        (b"\1" * 512, "checksum"),
        (
            pax([(b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"8,5")])
            + header(size=5)
            + padded(b"abcde")
            + end(),
            "bad region",
        ),
        (
            pax([(b"GNU.sparse.size", b"10"), (b"GNU.sparse.map", b"4,2,0,2")])
            + header(size=4)
            + padded(b"abcd")
            + end(),
            "bad region",
        ),
    ],
)
def test_refused(raw, problem):
    with pytest.raises(FormatError, match=problem):
        entries(raw)


def test_absolute_names_on_request():
    assert entries(header(b"/etc/x") + end(), strip_root=True)[0].path == b"etc/x"


def test_unknown_entry_type():
    with pytest.raises(Unsupported, match="entry type b'M'"):
        entries(header(kind=b"M") + end())


@pytest.mark.parametrize(
    ("raw", "limits", "name"),
    [
        (header(b"a") + header(b"b") + end(), Limits(entries=1), "entries"),
        (header(size=600) + bytes(1024) + end(), Limits(file_size=500), "file-size"),
        (header(size=600, kind=b"L") + bytes(1024) + end(), Limits(header_size=512), "header-size"),
        (
            pax([(b"SCHILY.xattr.user.a", b"v" * 99)]) + header() + end(),
            Limits(xattr_size=50),
            "xattr-size",
        ),
        (
            pax([(b"GNU.sparse.size", b"9" * 15), (b"GNU.sparse.map", b"0,1")])
            + header(size=1)
            + padded(b"a")
            + end(),
            Limits(),
            "file-size",
        ),
    ],
)
def test_limits_are_named(raw, limits, name):
    with pytest.raises(LimitExceeded, match=f"limit {name} ") as caught:
        entries(raw, limits)
    assert f"--limit {name}=" in caught.value.hint


@given(
    st.integers(0, 3), st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=8)
)
def test_damage_ends_in_a_named_error(cut, flips):
    raw = bytearray(
        layer_tar(
            [
                Item(b"d", tarfile.DIRTYPE),
                Item(b"d/f", content=b"y" * 700, xattrs={b"user.k": b"v"}),
                Item(b"l", tarfile.SYMTYPE, link=b"d/f"),
            ]
        )
        + pax([(b"GNU.sparse.size", b"99"), (b"GNU.sparse.map", b"0,1")])
        + header(size=1)
        + padded(b"z")
        + end()
    )
    for position, value in flips:
        raw[position % len(raw)] = value
    try:
        for entry in entries(bytes(raw[: len(raw) - cut * 300])):
            assert all(place + length <= len(raw) for _, place, length in entry.segments)
    except ImgsnapError:
        pass


def test_pax_records_without_a_value_say_nothing_but_for_xattrs():
    records = [(b"path", b""), (b"uid", b""), (b"mtime", b""), (b"SCHILY.xattr.user.x", b"")]
    (entry,) = entries(pax(records) + header(b"name") + end())
    assert (entry.path, entry.uid, entry.mtime) == (b"name", 0, 0)
    assert entry.xattrs == ((b"user.x", b""),)
