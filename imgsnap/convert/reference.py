"""The reference tree: what an image's layers unpack to, computed the plain way.

It shares nothing with the converter: Python's own tarfile reads the layers and each entry is
applied to one dictionary of paths, as an extracting runtime applies it to a directory. Slow and
simple on purpose; `imgsnap check --source` and the property tests compare snapshots with it.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from imgsnap.convert.layer import kept_xattrs
from imgsnap.convert.pax import parse_time
from imgsnap.errors import IntegrityError
from imgsnap.formats.layer_index import Kind, XattrSet
from imgsnap.units import MIB

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_SYMLINKS_MAX = 40

_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.CONTTYPE: Kind.FILE,
    tarfile.GNUTYPE_SPARSE: Kind.FILE,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHAR_DEVICE,
    tarfile.BLKTYPE: Kind.BLOCK_DEVICE,
    tarfile.FIFOTYPE: Kind.FIFO,
    tarfile.DIRTYPE: Kind.DIRECTORY,
}


@dataclass(slots=True, eq=False)
class Node:
    """One inode; paths that are hard links of each other hold the same object."""

    kind: Kind
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: tuple[int, int] = (0, 0)  # seconds, nanoseconds
    size: int = 0
    sha256: str = ""  # hex, files only
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: XattrSet = ()
    children: dict[bytes, "Node"] = field(default_factory=dict)


Fresh = set[tuple[Node, bytes]]
"""(directory, name): what the layer at hand put there. Its whiteouts spare that."""


class ReferenceTree:
    """Layers are applied from the lowest up; `root` is the result."""

    def __init__(self) -> None:
        self.root = Node(Kind.DIRECTORY)

    def apply(self, layer: IO[bytes]) -> None:
        """Applies one uncompressed layer tar, read as a stream.

        Raises IntegrityError for a tar that cannot be unpacked.
        """
        fresh: Fresh = set()
        try:
            with tarfile.open(fileobj=layer, mode="r|") as tar:
                for info in tar:
                    self._apply(tar, info, fresh)
        except tarfile.TarError as error:
            raise IntegrityError(f"layer tar: {error}") from error

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """(path, node) of everything, parents first; the root is b""."""
        stack = [(b"", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            prefix = path + b"/" if path else b""
            stack += [(prefix + name, child) for name, child in node.children.items()]

    def _apply(self, tar: tarfile.TarFile, info: tarfile.TarInfo, fresh: Fresh) -> None:
        path = _parts(_raw(info.name))
        if not path:
            self._touch(self.root, info)
            return
        parent, name = self._directory(path[:-1], fresh), path[-1]
        if name == _OPAQUE:
            _hide(parent, set(parent.children), fresh)
        elif name.startswith(_WHITEOUT):
            if not name.startswith(b".wh..wh."):
                _hide(parent, {name[len(_WHITEOUT) :]}, fresh)
        elif info.islnk():
            node = self._lookup(_parts(_raw(info.linkname)))
            if node is None or node.kind == Kind.DIRECTORY:
                raise IntegrityError(f"hard link {info.name!r} to {info.linkname!r}: no such file")
            if node is not parent.children.get(name):
                parent.children[name] = node
                fresh.add((parent, name))
        else:
            self._place(tar, info, parent, name)
            fresh.add((parent, name))

    def _place(
        self,
        tar: tarfile.TarFile,
        info: tarfile.TarInfo,
        parent: Node,
        name: bytes,
    ) -> None:
        kind = _KINDS.get(info.type)
        if kind is None:
            raise IntegrityError(f"{info.name!r}: entry type {info.type!r}")
        old = parent.children.get(name)
        if kind == Kind.DIRECTORY and old is not None and old.kind == Kind.DIRECTORY:
            self._touch(old, info)
            return
        node = parent.children[name] = Node(kind)
        self._touch(node, info)
        if kind == Kind.FILE:
            self._read(tar, info, node)
        elif kind == Kind.SYMLINK:
            node.target = _raw(info.linkname)
        elif kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
            node.device = (info.devmajor, info.devminor)

    @staticmethod
    def _read(tar: tarfile.TarFile, info: tarfile.TarInfo, node: Node) -> None:
        sha256, size = hashlib.sha256(), 0
        content = tar.extractfile(info)
        if content is not None:
            while data := content.read(MIB):
                sha256.update(data)
                size += len(data)
        node.size, node.sha256 = size, sha256.hexdigest()

    @staticmethod
    def _touch(node: Node, info: tarfile.TarInfo) -> None:
        node.mode, node.uid, node.gid = info.mode & 0o7777, info.uid, info.gid
        stated = info.pax_headers.get("mtime")
        node.mtime = parse_time(stated.encode(), 0) if stated else (int(info.mtime), 0)
        pairs = sorted(
            (_raw(key[len("SCHILY.xattr.") :]), _raw(value))
            for key, value in info.pax_headers.items()
            if key.startswith("SCHILY.xattr.")
        )
        node.xattrs = kept_xattrs(tuple(pairs))

    def _directory(self, parts: list[bytes], fresh: Fresh) -> Node:
        """The directory at this path: symlinks followed, what is missing made."""
        node, trail, budget = self.root, [self.root], _SYMLINKS_MAX
        todo = list(parts)
        while todo:
            part = todo.pop(0)
            if part in (b"", b"."):
                continue
            if part == b"..":
                trail = trail[:-1] or [self.root]
                node = trail[-1]
                continue
            child = node.children.get(part)
            if child is not None and child.kind == Kind.SYMLINK:
                budget -= 1
                if budget < 0:
                    raise IntegrityError(f"{b'/'.join(parts)!r}: too many symlinks")
                if child.target.startswith(b"/"):
                    node, trail = self.root, [self.root]
                todo = child.target.split(b"/") + todo
                continue
            if child is None or child.kind != Kind.DIRECTORY:
                child = node.children[part] = Node(Kind.DIRECTORY)
                fresh.add((node, part))
            node = child
            trail.append(node)
        return node

    def _lookup(self, parts: list[bytes]) -> Node | None:
        node: Node | None = self._directory(parts[:-1], set())
        return node.children.get(parts[-1]) if node is not None and parts else None


def _hide(parent: Node, names: set[bytes], fresh: Fresh) -> None:
    """Removes what lower layers put there; what this layer put below it stays."""
    for name in names & parent.children.keys():
        own = _own_part(parent, name, fresh)
        if own is None:
            del parent.children[name]
        else:
            parent.children[name] = own


def _own_part(parent: Node, name: bytes, fresh: Fresh) -> Node | None:
    """What this layer has at and below a name. A directory that it only put things into has the
    attributes of one that nobody made an entry for."""
    node, mine = parent.children[name], (parent, name) in fresh
    if node.kind != Kind.DIRECTORY:
        return node if mine else None
    parts = {below: _own_part(node, below, fresh) for below in node.children}
    own = {below: part for below, part in parts.items() if part is not None}
    if not own and not mine:
        return None
    kept = node if mine else Node(Kind.DIRECTORY)
    kept.children = own
    fresh.update((kept, below) for below in own)
    return kept


def _raw(text: str) -> bytes:
    """tarfile decodes with surrogateescape; PAX values it decodes as UTF-8 the same way."""
    return text.encode("utf-8", "surrogateescape")


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part and part != b"."]
