"""Comparing a snapshot with its source image, entry by entry."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.convert.ingest import LayerSource, spool
from imgsnap.convert.limits import Limits
from imgsnap.convert.reference import Node, ReferenceTree
from imgsnap.convert.source import SourceImage
from imgsnap.formats.erofs_read import ErofsReader, Inode
from imgsnap.formats.layer_index import Kind
from imgsnap.oci.repository import Repository
from imgsnap.units import MIB


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that differs; `path` is b"" for the root."""

    path: bytes
    field: str  # missing, extra, type, mode, owner, mtime, xattrs, device, target, size, ...
    snapshot: str
    source: str


def reference_tree(
    source: Repository, image: SourceImage, work_dir: Path, limits: Limits
) -> ReferenceTree:
    """What the image's layers unpack to; each layer is verified and spooled once."""
    tree = ReferenceTree()
    with TemporaryDirectory(dir=work_dir, prefix="imgsnap-check-") as directory:
        for layer in image.layers:
            with (
                _tar(source, layer, Path(directory) / "layer.tar", limits) as path,
                path.open("rb") as file,
            ):
                tree.apply(file)
    return tree


@contextmanager
def _tar(source: Repository, layer: LayerSource, path: Path, limits: Limits) -> Iterator[Path]:
    spool(source, layer, path, limits, lambda count: None)
    try:
        yield path
    finally:
        path.unlink()


def compare(reader: ErofsReader, tree: ReferenceTree) -> Iterator[Difference]:
    """Every difference between the snapshot's tree and the source's, sorted by path."""
    ours = dict(reader.walk())
    theirs = dict(tree.walk())
    links = _LinkGroups()
    for path in sorted(ours.keys() | theirs.keys()):
        inode, node = ours.get(path), theirs.get(path)
        if inode is None:
            yield Difference(path, "missing", "", "present")
        elif node is None:
            yield Difference(path, "extra", "present", "")
        else:
            yield from _compare_entry(reader, path, inode, node)
            if inode.kind != Kind.DIRECTORY:
                yield from links.compare(path, inode, node)


class _LinkGroups:
    """Paths that are one inode on one side must be one on the other."""

    def __init__(self) -> None:
        self._first: dict[int, tuple[bytes, int]] = {}
        self._seen: dict[int, int] = {}

    def compare(self, path: bytes, inode: Inode, node: Node) -> Iterator[Difference]:
        known = self._first.setdefault(inode.nid, (path, id(node)))
        back = self._seen.setdefault(id(node), inode.nid)
        if known[1] != id(node) or back != inode.nid:
            yield Difference(path, "links", f"linked with {known[0]!r}", "linked otherwise")


def _compare_entry(
    reader: ErofsReader, path: bytes, inode: Inode, node: Node
) -> Iterator[Difference]:
    if inode.kind != node.kind:
        yield Difference(path, "type", Kind(inode.kind).name, node.kind.name)
        return
    pairs: list[tuple[str, object, object]] = [
        ("mode", oct(inode.mode), oct(node.mode)),
        ("owner", (inode.uid, inode.gid), (node.uid, node.gid)),
        ("mtime", (inode.mtime, inode.nsec), node.mtime),
        ("xattrs", reader.xattrs(inode), node.xattrs),
    ]
    if node.kind == Kind.SYMLINK:
        pairs.append(("target", reader.readlink(inode), node.target))
    elif node.kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
        pairs.append(("device", _device(inode.rdev), node.device))
    elif node.kind == Kind.FILE:
        pairs.append(("size", inode.size, node.size))
        if inode.size == node.size:
            pairs.append(("content", _sha256(reader, inode), node.sha256))
    for field, ours, theirs in pairs:
        if ours != theirs:
            yield Difference(path, field, str(ours)[:200], str(theirs)[:200])


def _device(rdev: int) -> tuple[int, int]:
    """linux/kdev_t.h new_decode_dev."""
    return (rdev & 0xFFF00) >> 8, (rdev & 0xFF) | (rdev >> 12 & 0xFFF00)


def _sha256(reader: ErofsReader, inode: Inode) -> str:
    sha256 = hashlib.sha256()
    for offset in range(0, inode.size, MIB):
        sha256.update(reader.read(inode, offset, min(MIB, inode.size - offset)))
    return sha256.hexdigest()
