"""Layers for tests, described as dictionaries: description -> LayerIndex and extent bytes.

Deliberately simple and separate from the converter's tar parser.
"""

import hashlib
from dataclasses import dataclass, field

from imgsnap.digest import Digest, chunk_id
from imgsnap.formats.layer_index import DirectoryRecord, Kind, LayerIndex
from imgsnap.formats.rules import Rules
from imgsnap.units import BLOCK_SIZE, blocks_for


@dataclass(frozen=True)
class Node:
    """An entry of a layer with attributes of its own."""

    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    nsec: int = 0
    content: bytes = b""
    target: bytes = b""
    rdev: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Link:
    """A hard link to a path of the same layer or, if it has none, of a lower layer."""

    target: bytes
    lower: bool = False  # of a lower layer even if this one has the path too


@dataclass
class Layer:
    """A layer: entries by path (no slashes at the ends), and what it hides of lower layers."""

    entries: dict[bytes, Node | Link] = field(default_factory=dict)
    whiteouts: set[bytes] = field(default_factory=set)
    opaque: set[bytes] = field(default_factory=set)
    label: str = ""  # makes the diffID, in place of the content


@dataclass
class BuiltLayer:
    index: LayerIndex
    extent: bytes


def directory(**attributes) -> Node:
    return Node(Kind.DIRECTORY, **{"mode": 0o755, **attributes})


def regular(content: bytes = b"", **attributes) -> Node:
    return Node(Kind.FILE, content=content, **attributes)


def symlink(target: bytes, **attributes) -> Node:
    return Node(Kind.SYMLINK, target=target, **{"mode": 0o777, **attributes})


def encode_device(major: int, minor: int) -> int:
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def build(layer: Layer) -> BuiltLayer:
    index = LayerIndex(diff_id=_diff_id(layer), rules=Rules())
    extent = _add_files(index, layer)
    xattr_ids: dict[tuple, int] = {(): 0}
    target_ids: dict[bytes, int] = {}
    rows: dict[bytes, int] = {}
    for path, node in sorted(layer.entries.items()):
        if isinstance(node, Node):
            rows[path] = _add_inode(index, node, xattr_ids, target_ids)
    index.directories = _directories(index, layer, rows)
    return BuiltLayer(index, extent)


def build_all(layers: list[Layer]) -> list[BuiltLayer]:
    return [build(layer) for layer in layers]


def _diff_id(layer: Layer) -> Digest:
    facts = (sorted(layer.entries.items()), sorted(layer.whiteouts), sorted(layer.opaque))
    text = layer.label or repr(facts)
    return Digest("sha256:" + hashlib.sha256(text.encode()).hexdigest())


def _add_files(index: LayerIndex, layer: Layer) -> bytes:
    extent = bytearray()
    seen: set[bytes] = set()
    for _, node in sorted(layer.entries.items()):
        if not isinstance(node, Node) or not node.content or node.content in seen:
            continue
        seen.add(node.content)
        index.files.digest += chunk_id(node.content)
        index.files.size.append(len(node.content))
        index.files.block.append(len(extent) // BLOCK_SIZE)
        extent += node.content
        extent += bytes(-len(extent) % BLOCK_SIZE)
    index.extent_blocks = blocks_for(len(extent))
    return bytes(extent)


def _add_inode(index: LayerIndex, node: Node, xattr_ids: dict, target_ids: dict) -> int:
    columns = index.inodes
    row = len(columns)
    for name in ("kind", "mode", "uid", "gid", "mtime", "nsec", "rdev"):
        getattr(columns, name).append(getattr(node, name))
    columns.size.append(len(node.content))
    columns.file.append(_file_row(index, node.content) + 1 if node.content else 0)
    xattrs = tuple(sorted(node.xattrs))
    if xattrs not in xattr_ids:
        xattr_ids[xattrs] = len(index.xattr_sets)
        index.xattr_sets.append(xattrs)
    columns.xattrs.append(xattr_ids[xattrs])
    target = 0
    if node.kind == Kind.SYMLINK:
        target = target_ids.setdefault(node.target, len(target_ids))
        if target == len(index.targets):
            index.targets.append(node.target)
    columns.target.append(target)
    return row


def _file_row(index: LayerIndex, content: bytes) -> int:
    return bytes(index.files.digest).index(chunk_id(content)) // 32


def _directories(index: LayerIndex, layer: Layer, rows: dict[bytes, int]) -> list[DirectoryRecord]:
    records: dict[bytes, DirectoryRecord] = {}

    def record(path: bytes) -> DirectoryRecord:
        found = records.setdefault(path, DirectoryRecord(path))
        while path:
            path = path.rpartition(b"/")[0]
            records.setdefault(path, DirectoryRecord(path))
        return found

    for path, node in sorted(layer.entries.items()):
        parent, _, name = path.rpartition(b"/")
        if isinstance(node, Node) and node.kind == Kind.DIRECTORY:
            record(path).inode = rows[path]
            continue
        parent_record = record(parent)
        parent_record.names.append(name)
        parent_record.inodes.append(_link_row(index, layer, rows, path))
    for path in layer.opaque:
        record(path).opaque = True
    for path in sorted(layer.whiteouts):
        parent, _, name = path.rpartition(b"/")
        record(parent).whiteouts.append(name)
    return [records[path] for path in sorted(records)]


def _link_row(index: LayerIndex, layer: Layer, rows: dict[bytes, int], path: bytes) -> int:
    lower = False
    while not lower and isinstance(node := layer.entries.get(path), Link):
        path, lower = node.target, node.lower
    if path in rows and not lower:
        return rows[path]
    index.lower_links.append(path)
    return -len(index.lower_links)
