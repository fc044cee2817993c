"""Hypothesis strategies for stacks of layer tars, dense in what unpackers disagree about.

The tars are what image builders may write: every path once or several times, parents before
children, after them or not at all, whiteouts anywhere, in the dialects of tar writers.
"""

import io
import tarfile
from dataclasses import dataclass

from hypothesis import assume
from hypothesis import strategies as st

from imgsnap.convert.reference import ReferenceTree
from imgsnap.errors import IntegrityError
from imgsnap.formats.layer_index import Kind
from tests.support.tars import BLOCK, Item, end, header, padded, pax, raw_item

DIR, FILE, LINK, SYM = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
CHR, BLK, FIFO = tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE

NAMES = (b"a", b"b", b"c", b"-", b"..a", b"\xff\xfe n", b"n" * 200)
names = st.sampled_from(NAMES)
paths = st.lists(names, min_size=1, max_size=3).map(b"/".join)
contents = st.sampled_from([b"", b"x", b"same" * 700, b"e" * 4096, b"f" * 4097, b"h" * 40_000])
owners = st.sampled_from([0, 1000, 65536, 2_000_000_000])
mtimes = st.sampled_from(
    ["0", "1700000000", "1700000000.123456789", "-1", "-5.5", "0.000000001", "8589934592.5"]
)
devices = st.sampled_from([(1, 3), (4095, 1048575), (8, 257)])
targets = st.one_of(
    st.sampled_from([b"a", b"../b", b"/c", b"b/../a", b"/", b".", b"nowhere", b"/a/b", b"\xff"]),
    paths,
)
xattr_names = st.sampled_from(
    [b"user.x", b"user.\xc3\xa9", b"security.capability", b"trusted.t", b"trusted.overlay.opaque"]
)
xattr_values = st.sampled_from([b"", b"v", b"\0\xff=\n", b"long" * 300])
xattrs = st.dictionaries(xattr_names, xattr_values, max_size=2)
modes = st.sampled_from([0o644, 0o755, 0o4755, 0o1777, 0o2750, 0o600])


@dataclass(frozen=True)
class Entry:
    """An item and the dialect that its header is written in."""

    item: Item
    dialect: str = "pax"  # pax, gnu-sparse, pax-sparse


@st.composite
def entries(draw: st.DrawFn, known: list[bytes]) -> Entry:
    """An entry; links lead to `known` paths, so that most have a target."""
    path = draw(paths)
    kind = draw(st.sampled_from([FILE, FILE, DIR, DIR, SYM, CHR, BLK, FIFO, LINK]))
    common = {
        "path": path,
        "mode": draw(modes),
        "uid": draw(owners),
        "gid": draw(owners),
        "mtime": draw(mtimes),
    }
    if kind == LINK:
        link = draw(st.sampled_from(known)) if known else b"a"
        return Entry(Item(path, LINK, link=link))
    if kind == SYM:
        return Entry(Item(kind=SYM, link=draw(targets), **{**common, "mode": 0o777}))
    if kind in (CHR, BLK, FIFO):
        return Entry(Item(kind=kind, device=draw(devices) if kind != FIFO else (0, 0), **common))
    found = draw(xattrs)
    if kind == DIR:
        return Entry(Item(kind=DIR, xattrs=found, **common))
    dialect = draw(st.sampled_from(["pax", "pax", "gnu-sparse", "pax-sparse"]))
    item = Item(content=draw(contents), xattrs=found, **common)
    return Entry(item, dialect if item.content else "pax")


@st.composite
def layers(draw: st.DrawFn, known: list[bytes]) -> list[Entry]:
    """The entries of one layer; `known` is extended with the paths that can be linked to."""
    own: list[Entry] = []
    for _ in range(draw(st.integers(0, 7))):
        what = draw(st.integers(0, 9))
        if what == 0:
            path = draw(paths)
            parent, _, name = path.rpartition(b"/")
            own.append(Entry(Item((parent + b"/" if parent else b"") + b".wh." + name)))
            continue
        if what == 1:
            parent = draw(st.one_of(paths, st.just(b"")))
            own.append(Entry(Item((parent + b"/" if parent else b"") + b".wh..wh..opq")))
            continue
        entry = draw(entries(known))
        own.append(entry)
        if entry.item.kind not in (DIR, LINK) and entry.item.path not in known:
            known.append(entry.item.path)
    return own


@st.composite
def stacks(draw: st.DrawFn) -> list[list[Entry]]:
    known: list[bytes] = []
    return [draw(layers(known)) for _ in range(draw(st.integers(1, 3)))]


def to_tar(layer: list[Entry]) -> bytes:
    return b"".join(_bytes(entry) for entry in layer) + end()


def _bytes(entry: Entry) -> bytes:
    item = entry.item
    if entry.dialect == "gnu-sparse":
        return _gnu_sparse(item)
    if entry.dialect == "pax-sparse":
        return _pax_sparse(item)
    return raw_item(item)


def _holes(item: Item) -> tuple[list[tuple[int, int]], int, bytes]:
    """A file with a hole before and after its content: (regions, size, stored bytes)."""
    size = len(item.content) + 2 * BLOCK
    return [(BLOCK, len(item.content)), (size, 0)], size, item.content


def sparse_content(entry: Entry) -> bytes:
    """What a file holds once its holes are zeros."""
    if entry.dialect == "pax":
        return entry.item.content
    return bytes(BLOCK) + entry.item.content + bytes(BLOCK)


def _records(item: Item) -> list[tuple[bytes, bytes]]:
    return [
        (b"uid", str(item.uid).encode()),
        (b"gid", str(item.gid).encode()),
        (b"mtime", item.mtime.encode()),
        *((b"SCHILY.xattr." + name, value) for name, value in item.xattrs.items()),
    ]


def _gnu_sparse(item: Item) -> bytes:
    regions, size, stored = _holes(item)
    table = b"".join(b"%011o\0%011o\0" % region for region in regions).ljust(96, b"\0")
    tail = table + b"\0" + b"%011o\0" % size
    tail += bytes(BLOCK - 386 - len(tail))
    return (
        pax([(b"path", item.path), *_records(item)])
        + header(
            b"sparse",
            size=len(stored),
            kind=b"S",
            mode=b"%07o\0" % item.mode,
            magic=b"ustar  \0",
            tail=tail,
        )
        + padded(stored)
    )


def _pax_sparse(item: Item) -> bytes:
    regions, size, stored = _holes(item)
    lines = [len(regions), *(number for region in regions for number in region)]
    data = padded(b"".join(b"%d\n" % line for line in lines)) + stored
    return (
        pax(
            [
                (b"GNU.sparse.major", b"1"),
                (b"GNU.sparse.minor", b"0"),
                (b"GNU.sparse.name", item.path),
                (b"GNU.sparse.realsize", b"%d" % size),
                *_records(item),
            ]
        )
        + header(b"GNUSparseFile.0/x", size=len(data), mode=b"%07o\0" % item.mode)
        + padded(data)
    )


def unambiguous(layers: list[list[Entry]]) -> list[list[Entry]]:
    """The stack without entries about which unpackers differ for good reasons.

    These are entries below what the same layer made a file, whiteouts below what the same layer
    hides, and entries that reach a directory
    through a lower layer's symlink when another entry of their layer meets them there: then the
    outcome hangs on the order of the tar, which a layer's index does not keep.
    """
    tree = ReferenceTree()
    kept: list[list[Entry]] = []
    for layer in layers:
        view = _View(tree)
        chosen = [entry for entry in layer if view.take(entry.item)]
        try:
            tree.apply(io.BytesIO(to_tar(chosen)))
        except IntegrityError:
            assume(False)
        kept.append(chosen)
    return kept


def without_idle_whiteouts(layers: list[list[Entry]]) -> list[list[Entry]]:
    """The stack without whiteouts in directories that the lower layers do not have."""
    tree = ReferenceTree()
    kept = []
    for layer in layers:
        below = dict(tree.walk())
        chosen = []
        for entry in layer:
            parent, _, name = entry.item.path.rpartition(b"/")
            node = below.get(parent)
            if not name.startswith(b".wh.") or (node and node.kind == Kind.DIRECTORY):
                chosen.append(entry)
        tree.apply(io.BytesIO(to_tar(chosen)))
        kept.append(chosen)
    return kept


@dataclass(frozen=True)
class _Reach:
    """Where an entry leads: the path it names, the one it reaches, and the links on the way."""

    named: bytes
    real: bytes
    links: frozenset[bytes]

    def disputes(self, other: "_Reach") -> bool:
        if not self.links and not other.links:
            return False
        if self.links == other.links:
            return _related(self.real, other.real)
        mine = {self.named, self.real, *self.links}
        theirs = {other.named, other.real, *other.links}
        return any(_related(one, two) for one in mine for two in theirs)


class _View:
    """The lower layers under what one layer has added so far."""

    def __init__(self, tree: ReferenceTree) -> None:
        self._lower = dict(tree.walk())
        self._own: dict[bytes, Item] = {}
        self._reached: list[_Reach] = []
        self._hidden: list[bytes] = []  # by whiteouts
        self._hiders: list[bytes] = []  # directories with a whiteout or an opaque mark in them

    def take(self, item: Item) -> bool:
        path = item.path
        parent, _, name = path.rpartition(b"/")
        target = path
        if name == b".wh..wh..opq":
            target = parent
        elif name.startswith(b".wh."):
            target = (parent + b"/" if parent else b"") + name[4:]
        wanted = [target, *([item.link] if item.kind == LINK else [])]
        if any(self._is_own_file(above) for one in (path, *wanted) for above in _parents(one)):
            return False
        reaches = []
        for one in wanted:
            reach = self._reach(one, opaque=name == b".wh..wh..opq")
            if reach is None or any(reach.disputes(other) for other in self._reached):
                return False
            reaches.append(reach)
        if target != path:
            if any(_below(parent, other) for other in self._hidden) or any(
                _below(place, target) for place in self._hiders
            ):
                return False
            self._hiders.append(parent)
            if name != b".wh..wh..opq":
                self._hidden.append(target)
        if len(reaches) == 2 and reaches[0].disputes(reaches[1]):
            return False
        self._reached += reaches
        if target == path:
            self._own[path] = item
        return True

    def _is_own_file(self, path: bytes) -> bool:
        item = self._own.get(path)
        return item is not None and item.kind not in (DIR, SYM)

    def _link(self, path: bytes) -> tuple[bytes, bool] | None:
        """(target, whether a lower layer's) of a symlink."""
        if path in self._own:
            item = self._own[path]
            return (item.link, False) if item.kind == SYM else None
        node = self._lower.get(path)
        return (node.target, True) if node is not None and node.kind == Kind.SYMLINK else None

    def _reach(self, path: bytes, *, opaque: bool) -> _Reach | None:
        todo = path.split(b"/")[::-1]
        done: list[bytes] = []
        links: set[bytes] = set()
        for _ in range(200):
            if not todo:
                return _Reach(path, b"/".join(done), frozenset(links))
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                del done[-1:]
                continue
            done.append(name)
            found = self._link(b"/".join(done)) if todo or opaque else None
            if found is None:
                continue
            target, _ = found
            links.add(b"/".join(done))
            done = [] if target[:1] == b"/" else done[:-1]
            todo += target.split(b"/")[::-1]
        return None


def _parents(path: bytes) -> list[bytes]:
    names = path.split(b"/")
    return [b"/".join(names[:depth]) for depth in range(1, len(names))]


def _below(one: bytes, two: bytes) -> bool:
    """Is the first path the second, or below it?"""
    return one == two or not two or one.startswith(two + b"/")


def _related(one: bytes, two: bytes) -> bool:
    return _below(one, two) or _below(two, one)
