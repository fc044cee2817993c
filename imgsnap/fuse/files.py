"""The tree of a FUSE superblock: one directory per device, with one read-only file in it.

Node ids are made from the devices' numbers, so that a server that takes over from another one
knows what the kernel means: device n is directory 2n and file 2n + 1. A number is never used
twice, so the kernel may cache for ever.
"""

import stat
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from imgsnap.blockstore.content import FileContent
from imgsnap.fuse.protocol import NAME_MAX, ROOT_ID, directory_entry

DEVICE_FILE = "layer.erofs"
"""The file's name in its directory; Kata's runtime knows block devices by it."""


class Catalog(Protocol):
    """The devices that are served. Safe for threads; numbers are positive."""

    def number(self, name: str) -> int | None:
        """The device with this directory name."""

    def content(self, number: int) -> FileContent | None: ...

    def names(self) -> Iterable[tuple[int, str]]:
        """Numbers and directory names, by number."""

    def forgotten(self, number: int) -> None:
        """The kernel has no reference to the device's file any more."""


class Found(NamedTuple):
    """A node that a name led to; a directory has no content."""

    node: int
    content: FileContent | None


class FileTree:
    """Names and nodes of a catalog's devices."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def lookup(self, parent: int, name: bytes) -> Found | None:
        if parent == ROOT_ID:
            if not 0 < len(name) <= NAME_MAX:
                return None
            number = self._catalog.number(name.decode(errors="surrogateescape"))
            return Found(directory_node(number), None) if number is not None else None
        if parent & 1 or name != DEVICE_FILE.encode():
            return None
        content = self._catalog.content(parent >> 1)
        return Found(parent + 1, content) if content is not None else None

    def file(self, node: int) -> FileContent | None:
        """The content of a file's node."""
        return self._catalog.content(node >> 1) if node & 1 and node != ROOT_ID else None

    def is_directory(self, node: int) -> bool:
        return node == ROOT_ID or (not node & 1 and self._catalog.content(node >> 1) is not None)

    def forget(self, node: int) -> None:
        if node & 1 and node != ROOT_ID:
            self._catalog.forgotten(node >> 1)

    def listing(self, node: int, offset: int, size: int) -> bytes:
        """A directory's entries from the `offset`th on, at most `size` bytes of them."""
        entries = [(node, b".", stat.S_IFDIR), (ROOT_ID, b"..", stat.S_IFDIR)]
        if node == ROOT_ID:
            entries += [
                (directory_node(number), name.encode(errors="surrogateescape"), stat.S_IFDIR)
                for number, name in self._catalog.names()
            ]
        else:
            entries.append((node + 1, DEVICE_FILE.encode(), stat.S_IFREG))
        found = b""
        for number, (child, name, mode) in enumerate(entries[offset:], offset + 1):
            entry = directory_entry(child, number, name, mode)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def directory_node(number: int) -> int:
    """The node id of a device's directory; its file's is one more."""
    return number << 1
