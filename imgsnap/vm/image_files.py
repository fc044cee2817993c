"""Single files of an image, read from its attached disk by this process."""

import os
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import IntegrityError, NotFound
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.layer_index import Kind
from imgsnap.mount.container import ACCOUNT_FILE_MAX, ReadFile


@dataclass(frozen=True, slots=True)
class _Disk:
    fd: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise IntegrityError(f"the disk ends at {offset + len(data)}")
        return data


def files_on(disk: Path) -> ReadFile:
    """Reads the files of the EROFS on a disk; opens the disk for each."""

    def read(path: str) -> bytes:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)  # stat(2) has none for a block device
            reader = ErofsReader(_Disk(fd, size))
            inode = reader.resolve(path.encode())
            if inode.kind != Kind.FILE:
                return b""
            return reader.read(inode, 0, min(inode.size, ACCOUNT_FILE_MAX))
        except NotFound:
            return b""
        finally:
            os.close(fd)

    return read
