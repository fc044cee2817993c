"""The files of a FUSE superblock: one flat directory of read-only block devices."""

import stat
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from imgsnap.fuse.protocol import NAME_MAX, ROOT_ID, directory_entry

FetchDone = Callable[[memoryview | None, BaseException | None], None]


class FileContent(Protocol):
    """A file's bytes, as `imgsnap.blockstore.reader.BlockReader` gives them."""

    @property
    def size(self) -> int: ...

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fills `view` if that needs no waiting; False otherwise."""

    def fetch(self, offset: int, length: int, done: FetchDone) -> None:
        """Calls `done` once with the bytes or an error, from any thread."""


class FileTable:
    """Names and node ids. A node id is never used twice, so the kernel may cache for ever."""

    def __init__(self, files: Mapping[str, FileContent]) -> None:
        self._lock = threading.Lock()
        self._next = ROOT_ID + 1
        self._nodes: dict[int, tuple[bytes, FileContent]] = {}
        self._names: dict[bytes, int] = {}
        for name, content in files.items():
            self.add(name, content)

    def add(self, name: str, content: FileContent) -> int:
        """Makes a file visible; its node id. Raises ValueError for a name that is taken or odd."""
        raw = name.encode()
        if not 0 < len(raw) <= NAME_MAX or b"/" in raw or raw in (b".", b".."):
            raise ValueError(f"not a file name: {name!r}")
        with self._lock:
            if raw in self._names:
                raise ValueError(f"{name!r} exists")
            node = self._next
            self._next += 1
            self._nodes[node] = (raw, content)
            self._names[raw] = node
        return node

    def lookup(self, name: bytes) -> tuple[int, FileContent] | None:
        node = self._names.get(name)
        return (node, self._nodes[node][1]) if node is not None else None

    def get(self, node: int) -> FileContent | None:
        entry = self._nodes.get(node)
        return entry[1] if entry is not None else None

    def __len__(self) -> int:
        return len(self._nodes)

    def listing(self, offset: int, size: int) -> bytes:
        """Directory entries from the `offset`th on, at most `size` bytes of them."""
        with self._lock:
            files = [(node, raw) for node, (raw, _) in self._nodes.items()]
        entries = [(ROOT_ID, b".", stat.S_IFDIR), (ROOT_ID, b"..", stat.S_IFDIR)]
        entries += [(node, raw, stat.S_IFREG) for node, raw in files]
        found = b""
        for number, (node, raw, mode) in enumerate(entries[offset:], offset + 1):
            entry = directory_entry(node, number, raw, mode)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found
