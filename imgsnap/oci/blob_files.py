"""Where the bytes of a local repository are: a layout directory, or inside an archive.

`LocalReader` in local_reader reads manifests, tags and referrers from any of them.
"""

import os
from types import TracebackType
from typing import Protocol

from imgsnap.digest import Digest
from imgsnap.errors import IntegrityError, Unavailable


class BlobFile(Protocol):
    """An open blob. `size` in bytes."""

    @property
    def size(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length); the caller stays within `size`.

        Raises Unavailable when the disk fails, IntegrityError when the file became shorter.
        """

    def close(self) -> None: ...


class BlobFiles(Protocol):
    """A set of blobs with an index.json."""

    @property
    def name(self) -> str: ...

    def index(self) -> bytes:
        """The bytes of index.json."""

    def find(self, digest: Digest) -> BlobFile | None:
        """The blob with this digest, opened; None when there is none. Not verified."""

    def close(self) -> None: ...


class DescriptorFile:
    """A blob that is (part of) an open file. Closes `fd` when it owns it."""

    def __init__(self, fd: int, offset: int, size: int, what: str, *, owned: bool) -> None:
        self._fd = fd
        self._offset = offset
        self._size = size
        self._what = what
        self._owned = owned

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """See BlobFile.read_at."""
        parts: list[bytes] = []
        position, end = self._offset + offset, self._offset + offset + length
        while position < end:
            try:
                data = os.pread(self._fd, end - position, position)
            except OSError as error:
                raise Unavailable(f"{self._what}: {error.strerror}") from error
            if not data:
                raise IntegrityError(f"{self._what}: the file ends {end - position} bytes early")
            parts.append(data)
            position += len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Closes the descriptor if this object owns it; once."""
        if self._owned:
            self._owned = False
            os.close(self._fd)


class MemoryFile:
    """A blob that exists in memory only."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        """See BlobFile.read_at."""
        return self._data[offset : offset + length]

    def close(self) -> None:
        """Nothing to do."""


class FileStream:
    """A ByteStream over a BlobFile; a context manager that closes it. Not thread safe."""

    def __init__(self, file: BlobFile) -> None:
        self._file = file
        self._offset = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end."""
        length = min(size, self._file.size - self._offset)
        if length <= 0:
            return b""
        data = self._file.read_at(self._offset, length)
        self._offset += len(data)
        return data

    def __enter__(self) -> "FileStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
