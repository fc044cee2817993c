"""The same layers as directories below an overlayfs mount: the kernel as the model of flatten.

A layer is written as containerd's overlay applier writes it: whiteouts are character devices
0/0, opaque directories have trusted.overlay.opaque, and a directory that the layer has no entry
for gets the attributes of the lower one that it is merged with.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hypothesis import reject

from imgsnap.formats.layer_index import Kind
from tests.support.layers import Layer, Link, Node
from tests.support.mounts import MS_RDONLY, mounted

OPAQUE = b"trusted.overlay.opaque"


@contextlib.contextmanager
def overlay(layers: list[Layer], scratch: Path) -> Iterator[Path]:
    """Mounts `layers`, lowest first; `scratch` should be on tmpfs, which keeps all attributes."""
    empty = scratch / "empty"
    empty.mkdir()
    lowers = [empty]
    for number, layer in enumerate(layers):
        top = scratch / f"l{number}"
        top.mkdir()
        with contextlib.ExitStack() as stack:
            view = _mount(lowers, scratch / "view", stack) if number else empty
            Materialiser(layer, os.fsencode(top), os.fsencode(view), first=not number).run()
        if b"" in layer.opaque:
            # OCI lets a layer hide everything; overlayfs merges the roots whatever they say.
            lowers = [empty]
        lowers.insert(0, top)
    with contextlib.ExitStack() as stack:
        yield _mount(lowers, scratch / "view", stack)


def _mount(lowers: list[Path], target: Path, stack: contextlib.ExitStack) -> Path:
    options = "lowerdir=" + ":".join(map(str, lowers))
    return stack.enter_context(mounted("overlay", target, "overlay", MS_RDONLY, options))


class Materialiser:
    """Writes one layer into `top`, given a mount of the layers below it."""

    def __init__(self, layer: Layer, top: bytes, lower: bytes, *, first: bool) -> None:
        self.layer, self.top, self.lower, self.first = layer, top, lower, first

    def run(self) -> None:
        layer = self.layer
        directories = self._directories()
        if any(map(self._is_followed, directories - layer.entries.keys())):
            reject()
        for path in sorted(directories - {b""}):
            os.mkdir(self._at(path))
        for path, node in sorted(layer.entries.items()):
            if isinstance(node, Node) and node.kind != Kind.DIRECTORY:
                self._create(path, node)
        for path, node in sorted(layer.entries.items()):
            if isinstance(node, Link):
                os.link(self._at(self._final(path)), self._at(path), follow_symlinks=False)
        for path in layer.whiteouts:
            if path in directories:
                os.setxattr(self._at(path), OPAQUE, b"y")
            elif path not in layer.entries and self._visible(path, own_whiteout=True):
                os.mknod(self._at(path), stat.S_IFCHR, os.makedev(0, 0))
        for path in sorted(directories, reverse=True):
            self._finish_directory(path)

    def _at(self, path: bytes) -> bytes:
        return os.path.join(self.top, path) if path else self.top

    def _final(self, path: bytes) -> bytes:
        while isinstance(node := self.layer.entries[path], Link):
            path = node.target
        return path

    def _directories(self) -> set[bytes]:
        """Entries, and parents of anything."""
        layer = self.layer
        found = {b""} | layer.opaque
        for path, node in layer.entries.items():
            if isinstance(node, Node) and node.kind == Kind.DIRECTORY:
                found.add(path)
        for path in [*layer.entries, *layer.whiteouts, *layer.opaque]:
            while path:
                path = path.rpartition(b"/")[0]
                found.add(path)
        return found

    def _is_followed(self, path: bytes) -> bool:
        """Does a directory without an entry meet a symlink? Flattening follows it, as extraction
        does; a layer that is stored by itself cannot."""
        below = os.path.join(self.lower, path)
        return not self.first and self._visible(path) and os.path.islink(below)

    def _visible(self, path: bytes, *, own_whiteout: bool = False) -> bool:
        """Does `path` exist below, and does this layer let it through?"""
        names = path.split(b"/") if path else []
        for depth in range(len(names)):
            parent = b"/".join(names[:depth])
            full = os.path.join(self.lower, parent)
            if parent in self.layer.opaque or parent in self.layer.whiteouts:
                return False
            if os.path.islink(full) or not os.path.isdir(full):
                return False
        if path in self.layer.whiteouts and not own_whiteout:
            return False
        return os.path.lexists(os.path.join(self.lower, path))

    def _create(self, path: bytes, node: Node) -> None:
        full = self._at(path)
        if node.kind == Kind.FILE:
            with open(full, "wb") as stream:
                stream.write(node.content)
        elif node.kind == Kind.SYMLINK:
            os.symlink(node.target, full)
        else:
            types = {
                Kind.FIFO: stat.S_IFIFO,
                Kind.CHAR_DEVICE: stat.S_IFCHR,
                Kind.BLOCK_DEVICE: stat.S_IFBLK,
            }
            major = node.rdev >> 8 & 0xFFF
            minor = node.rdev & 0xFF | node.rdev >> 12 & 0xFFF00
            os.mknod(full, types[node.kind], os.makedev(major, minor))
        self._set(full, node, is_link=node.kind == Kind.SYMLINK)

    def _finish_directory(self, path: bytes) -> None:
        full = self._at(path)
        if path in self.layer.opaque:
            os.setxattr(full, OPAQUE, b"y")
        node = self.layer.entries.get(path)
        if isinstance(node, Node):
            self._set(full, node)
            return
        below = os.path.join(self.lower, path)
        merged = not self.first and self._visible(path)
        if merged and os.path.isdir(below) and not os.path.islink(below):
            self._copy(below, full)
        else:
            self._set(full, Node(Kind.DIRECTORY, 0o755))

    def _set(self, full: bytes, node: Node, *, is_link: bool = False) -> None:
        os.chown(full, node.uid, node.gid, follow_symlinks=False)
        if not is_link:
            os.chmod(full, node.mode)
        for name, value in node.xattrs:
            os.setxattr(full, name, value, follow_symlinks=False)
        nanoseconds = node.mtime * 10**9 + node.nsec
        os.utime(full, ns=(nanoseconds, nanoseconds), follow_symlinks=False)

    def _copy(self, source: bytes, full: bytes) -> None:
        status = os.lstat(source)
        os.chown(full, status.st_uid, status.st_gid)
        os.chmod(full, stat.S_IMODE(status.st_mode))
        for name in os.listxattr(source):
            os.setxattr(full, name, os.getxattr(source, name))
        os.utime(full, ns=(status.st_mtime_ns, status.st_mtime_ns))
