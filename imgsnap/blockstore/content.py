"""What a front end, FUSE or ublk, reads a device through."""

from collections.abc import Callable
from typing import Protocol

FetchDone = Callable[[memoryview | None, BaseException | None], None]
"""Gets the bytes or the reason why there are none."""


class FileContent(Protocol):
    """A device's bytes, as `imgsnap.blockstore.reader.BlockReader` gives them."""

    @property
    def size(self) -> int: ...

    @property
    def exact(self) -> bool:
        """Whether the kernel is to ask for what is read and no more: it then neither caches nor
        reads ahead what it opens."""

    def read_into(self, view: memoryview, offset: int) -> bool:
        """Fills `view` if that needs no waiting; False otherwise."""

    def fetch(self, offset: int, length: int, done: FetchDone) -> None:
        """Calls `done` once with the bytes or an error, from any thread."""
