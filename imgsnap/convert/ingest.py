"""One layer blob, streamed: verified against its digest, decompressed, verified against its
diffID, and spooled to a file that the chunker can read in extent order.

Memory is a few MiB whatever the layer's size: the tar lives in the page cache of the work
directory's disk, and mapped pages are given back as the parser passes them.
"""

import contextlib
import hashlib
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from imgsnap.convert.content import FileContent, digest
from imgsnap.convert.layer import BuiltLayer, build_layer
from imgsnap.convert.limits import Limits
from imgsnap.convert.tar import TarEntry, TarReader
from imgsnap.digest import Digest
from imgsnap.errors import DigestMismatch, IntegrityError
from imgsnap.formats.rules import Rules
from imgsnap.oci.repository import ByteStream, Descriptor, Repository
from imgsnap.units import GIB, MIB

READ_SIZE = MIB
DROP_EVERY = 32 * MIB
"""Mapped pages count as resident memory; they are dropped after this much has been parsed."""

ZSTD_WINDOW_MAX = 128 * MIB
"""What the zstd command line accepts without --long."""

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One layer of the source image: its blob and the diffID that the image config states."""

    descriptor: Descriptor
    diff_id: Digest

    @property
    def label(self) -> str:
        return self.diff_id[7:19]


class _Hasher:
    """sha256 on its own thread, so that it overlaps with decompression on the other core."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=4)
        self._thread = threading.Thread(target=self._run, name="imgsnap-sha256", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._sha256.update(data)

    def update(self, data: bytes) -> None:
        self._queue.put(data)

    def finish(self) -> Digest:
        self._queue.put(None)
        self._thread.join()
        return Digest("sha256:" + self._sha256.hexdigest())


class _VerifiedStream:
    """The blob's compressed bytes, hashed on the way."""

    def __init__(self, stream: ByteStream, advance: Callable[[int], None]) -> None:
        self._stream = stream
        self._advance = advance
        self.hasher = _Hasher()
        self.size = 0

    def read(self) -> bytes:
        data = self._stream.read(READ_SIZE)
        self.size += len(data)
        self.hasher.update(data)
        self._advance(len(data))
        return data


def _gunzip(stream: _VerifiedStream, head: bytes) -> Iterator[bytes]:
    """Members of a gzip file one after the other, as gunzip does. Raises IntegrityError."""
    from isal import igzip_lib, isal_zlib

    # The package's stubs declare the exception class as an instance.
    damaged = cast(type[Exception], igzip_lib.IsalError)
    data = head
    while data:
        member = isal_zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data:
                data = stream.read()
                if not data:
                    raise IntegrityError("the gzip stream is cut off")
            try:
                content = member.decompress(data, 4 * READ_SIZE)
            except (damaged, EOFError) as error:
                raise IntegrityError(f"the gzip stream is damaged: {error}") from error
            data = member.unconsumed_tail
            if member.eof:
                data = member.unused_data
            if content:
                yield content
        data = (data or stream.read()).lstrip(b"\0")  # padding is legal after the last member
        if data and not data.startswith(_GZIP[: len(data)]):
            raise IntegrityError("the gzip stream is followed by other bytes")


def _unzstd(stream: _VerifiedStream, head: bytes) -> Iterator[bytes]:
    """All frames of a zstd file. Raises IntegrityError."""
    import zstandard

    class Source:
        pending = head

        def read(self, size: int) -> bytes:
            data, self.pending = self.pending or stream.read(), b""
            return data

    # The reader bounds its output, where a decompressobj would expand a bomb in one call. It
    # ends quietly when the input is cut off; the digests tell then.
    reader = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX).stream_reader(
        cast(IO[bytes], Source()), read_across_frames=True
    )
    try:
        while content := reader.read(READ_SIZE):
            yield content
    except zstandard.ZstdError as error:
        raise IntegrityError(f"the zstd stream is damaged: {error}") from error


def _plain(stream: _VerifiedStream, head: bytes) -> Iterator[bytes]:
    data = head
    while data:
        yield data
        data = stream.read()


def _decompressed(stream: _VerifiedStream) -> Iterator[bytes]:
    """By magic, not by media type: docker has pushed gzip under the plain tar type and back."""
    head = stream.read()
    if head.startswith(_GZIP):
        yield from _gunzip(stream, head)
    elif head.startswith(_ZSTD):
        yield from _unzstd(stream, head)
    else:
        yield from _plain(stream, head)
    while stream.read():  # the digest covers what follows too
        pass


def spool(
    repository: Repository,
    layer: LayerSource,
    path: Path,
    limits: Limits,
    advance: Callable[[int], None],
) -> int:
    """Writes the layer's verified tar to `path`; returns its size in bytes.

    Raises DigestMismatch, IntegrityError, LimitExceeded and what the repository raises; `path`
    may then hold part of the tar.
    """
    where = f"layer {layer.descriptor.digest}"
    tar_hasher = _Hasher()
    size = 0
    with repository.open_blob(layer.descriptor) as source, path.open("wb") as file:
        stream = _VerifiedStream(source, advance)
        try:
            for content in _decompressed(stream):
                size += len(content)
                limits.check("layer_size", size, where=where)
                if size > GIB:
                    limits.check("layer_ratio", size // max(stream.size, 1), where=where)
                tar_hasher.update(content)
                file.write(content)
        except IntegrityError as error:
            _check_blob(stream, layer)
            raise IntegrityError(f"{where}: {error}", hint=error.hint) from error
        finally:
            blob, tar = stream.hasher.finish(), tar_hasher.finish()
    if blob != layer.descriptor.digest:
        raise DigestMismatch(f"{where} as received", layer.descriptor.digest, blob)
    if tar != layer.diff_id:
        raise DigestMismatch(
            f"{where} decompressed",
            layer.diff_id,
            tar,
            hint="the image config states another diffID: the image is malformed or forged",
        )
    return size


def _check_blob(stream: _VerifiedStream, layer: LayerSource) -> None:
    """A damaged stream whose digest is wrong was damaged on the way: say that instead."""
    while stream.read():
        pass
    got = stream.hasher.finish()
    if got != layer.descriptor.digest:
        raise DigestMismatch(
            f"layer {layer.descriptor.digest} as received",
            layer.descriptor.digest,
            got,
            hint="the transfer or the registry's storage is damaged; try again",
        )


def index_tar(
    path: Path, layer: LayerSource, rules: Rules, limits: Limits, *, strip_root: bool
) -> BuiltLayer:
    """The index of a spooled tar. Raises FormatError, LimitExceeded, Unsupported."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if not os.fstat(fd).st_size:
            return build_layer((), layer.diff_id, rules, lambda content: b"")
        mapping = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        view = memoryview(mapping)
        try:
            reader = TarReader(view, limits, strip_root=strip_root)
            pages = _Pages(mapping, reader)
            return build_layer(
                pages.entries(), layer.diff_id, rules, lambda content: pages.digest(content)
            )
        finally:
            view.release()
            # The traceback of an error may hold slices; the mapping then goes when it does.
            with contextlib.suppress(BufferError):
                mapping.close()
    finally:
        os.close(fd)


class _Pages:
    """Hashes and parses over a mapping, dropping its pages as they have been used."""

    def __init__(self, mapping: mmap.mmap, reader: TarReader) -> None:
        self._mapping = mapping
        self._reader = reader
        self._touched = 0

    def _touch(self, size: int) -> None:
        self._touched += size
        if self._touched >= DROP_EVERY:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._touched = 0

    def entries(self) -> Iterator[TarEntry]:
        before = 0
        for entry in self._reader:
            yield entry
            # A header touches one page and, through fault-around, some of its neighbours.
            self._touch(min(self._reader.position - before, 64 << 10))
            before = self._reader.position

    def digest(self, content: FileContent) -> bytes:
        self._touch(content.size)
        return digest(content, self._reader.buffer)
