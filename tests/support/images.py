"""Built layers -> a device, as a value and as a file, and its judges."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

from imgsnap.convert.erofs_write import ErofsMetadata, emit
from imgsnap.convert.flatten import flatten
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.layer_index import Kind
from imgsnap.units import BLOCK_SIZE
from tests.support.layers import BuiltLayer, Layer, build_all


@dataclass
class Bytes:
    """A BlockSource over bytes; refuses what a real device would refuse."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0 and length >= 0 and offset + length <= len(self.data)
        return bytes(self.data[offset : offset + length])


def emit_layers(built: list[BuiltLayer]) -> ErofsMetadata:
    return emit(flatten([layer.index for layer in built]))


def device(layers: list[Layer]) -> bytes:
    """Metadata and extents, one after the other."""
    built = build_all(layers)
    metadata = emit_layers(built)
    data = metadata.metadata
    for layer, base in zip(built, metadata.bases, strict=True):
        assert len(data) == base * BLOCK_SIZE
        data += layer.extent
    assert len(data) == metadata.total_blocks * BLOCK_SIZE
    return data


def reader(layers: list[Layer]) -> ErofsReader:
    return ErofsReader(Bytes(device(layers)))


def fsck(path: Path) -> None:
    """erofs-utils as a judge; its exit code and what it says."""
    done = subprocess.run(["fsck.erofs", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def read_everything(erofs_reader: ErofsReader) -> dict[bytes, tuple]:
    """All that a reader can tell of each path."""
    found = {}
    for path, inode in erofs_reader.walk():
        content = b""
        if inode.kind == Kind.SYMLINK:
            content = erofs_reader.readlink(inode)
        elif inode.kind == Kind.FILE:
            content = erofs_reader.read(inode, 0, min(inode.size, 1 << 20))
        found[path] = (inode, erofs_reader.xattrs(inode), content)
    return found
