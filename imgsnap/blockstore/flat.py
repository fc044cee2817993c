"""A device that is a plain local file."""

import os
from pathlib import Path
from types import TracebackType
from typing import Self


class FlatDevice:
    """Reads of a file, for an EROFS reader; a context manager."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._fd).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` at the end."""
        return os.pread(self._fd, length, offset)
