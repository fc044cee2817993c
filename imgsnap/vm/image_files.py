"""Single files of an image, read from its attached disk by this process."""

import os
from dataclasses import dataclass
from pathlib import Path

from imgsnap.blockstore.verity_tree import VerifiedDevice
from imgsnap.errors import IntegrityError, NotFound
from imgsnap.formats.erofs_read import BlockSource, ErofsReader
from imgsnap.formats.layer_index import Kind
from imgsnap.mount.container import ACCOUNT_FILE_MAX, ReadFile
from imgsnap.vm.verity import VerifiedRoot


@dataclass(frozen=True, slots=True)
class _Disk:
    fd: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        if len(data) != length:
            raise IntegrityError(f"the disk ends at {offset + len(data)}")
        return data


def _device(fd: int, root: VerifiedRoot | None) -> BlockSource:
    if root is None:
        return _Disk(fd, os.lseek(fd, 0, os.SEEK_END))  # stat(2) has none for a block device
    return VerifiedDevice(fd, root.layout.data_blocks, root.root_hash)


def files_on(disk: Path, root: VerifiedRoot | None) -> ReadFile:
    """Reads the files of the EROFS on a disk; opens the disk for each. With a `root` every block is
    verified: what they say decides who the guest's command is."""

    def read(path: str) -> bytes:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            reader = ErofsReader(_device(fd, root))
            inode = reader.resolve(path.encode())
            if inode.kind != Kind.FILE:
                return b""
            return reader.read(inode, 0, min(inode.size, ACCOUNT_FILE_MAX))
        except NotFound:
            return b""
        finally:
            os.close(fd)

    return read
