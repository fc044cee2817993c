"""Boot packs of made-up snapshots, in a memory repository that can serve them badly."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from imgsnap.blockstore.boot_choice import BootPack
from imgsnap.convert.boot_pack import build
from imgsnap.digest import Digest, sha256_digest
from imgsnap.formats.trace import Touch, Trace
from imgsnap.oci.media_types import ARTIFACT_BOOT_PACK, BOOT_PACK
from imgsnap.oci.repository import ByteStream, Descriptor
from imgsnap.units import BLOCK_SIZE
from tests.support.block_store import open_store
from tests.support.memory_repository import MemoryRepository
from tests.support.snapshots import BuiltSnapshot


class PackRepository(MemoryRepository):
    """Streams of boot packs in pieces, cut off or held up at a byte."""

    def __init__(self, *snapshots: BuiltSnapshot, piece: int = 64 << 10) -> None:
        super().__init__(*snapshots)
        self.piece = piece
        self.cut_at: int | None = None
        self.stall_at: int | None = None
        self.go_on = threading.Event()

    @contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[ByteStream]:
        self._request("open", descriptor.digest)
        yield _Stream(self, self._get(descriptor))


class _Stream:
    def __init__(self, repository: PackRepository, data: bytes) -> None:
        self._repository = repository
        self._data = BytesIO(data if repository.cut_at is None else data[: repository.cut_at])

    def read(self, size: int) -> bytes:
        stall_at = self._repository.stall_at
        if stall_at is not None and self._data.tell() + size > stall_at:
            self._repository.go_on.wait(20)
        return self._data.read(min(size, self._repository.piece))


def trace_of(snapshot: BuiltSnapshot, blocks: Sequence[int]) -> Trace:
    """As if these blocks of the device had been read in this order; the metadata is left out."""
    extents = tuple(extent.extent_id for extent in snapshot.config.extents)
    touches = []
    for block in blocks:
        for number, extent in enumerate(snapshot.config.extents):
            if 0 <= block - extent.base_block < extent.blocks:
                touches.append(Touch(number, block - extent.base_block, 1))
    return Trace(extents, tuple(touches))


def pack_bytes(snapshot: BuiltSnapshot, traces: Sequence[Trace], work: Path) -> bytes:
    """A boot pack, made through a block store of its own."""
    with open_store(MemoryRepository(snapshot), work / "optimize-cache") as store:
        return build(store.snapshot, store.reader, traces, work / "boot").path.read_bytes()


def attach_pack(
    repository: MemoryRepository,
    snapshot: BuiltSnapshot,
    data: bytes,
    name: str = "app",
    *,
    created: str = "2026-01-01T00:00:00Z",
    default: bool = True,
) -> Digest:
    """Makes bytes a boot pack of the snapshot in the repository; the blob's digest."""
    digest = sha256_digest(data)
    blob = Descriptor(BOOT_PACK, digest, len(data))
    repository.blobs[digest] = data
    manifest = sha256_digest(f"{name} {created} {digest}".encode())
    pack = BootPack(name, blob, default, created, manifest)
    entry = Descriptor("", manifest, 100, pack.annotations(), artifact_type=ARTIFACT_BOOT_PACK)
    repository.subjects.setdefault(snapshot.digest, []).append(entry)
    return digest


def damaged(data: bytes, position: int) -> bytes:
    position %= len(data)
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def device_bytes(snapshot: BuiltSnapshot, block: int, count: int) -> bytes:
    return snapshot.device[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE]
