"""Zstandard frames: every one carries its content size, and a reader says how much it expects."""

import threading
from typing import TYPE_CHECKING

from imgsnap.errors import FormatError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressor

_local = threading.local()


def _decompressor() -> "ZstdDecompressor":
    """One context per thread: making one costs more than a small frame."""
    context: ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if context is None:
        import zstandard

        context = _local.decompressor = zstandard.ZstdDecompressor()
    return context


def decompress(frame: bytes | memoryview, *, size_max: int, record: str) -> bytes:
    """The content of one frame of at most `size_max` bytes (RFC 8878).

    Raises FormatError when the frame is damaged, followed by other bytes, states no content
    size or a larger one: nothing is allocated before that is known.
    """
    from zstandard import ZstdError, get_frame_parameters

    try:
        size = get_frame_parameters(frame).content_size
    except ZstdError as error:
        raise FormatError(record, "zstd frame header", 0, str(error)) from error
    if not 0 <= size <= size_max:
        raise FormatError(record, "zstd content size", 0, f"{size} is over {size_max} or unknown")
    try:
        return _decompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except ZstdError as error:
        raise FormatError(record, "zstd frame", 0, str(error)) from error


def decompress_exact(frame: bytes | memoryview, size: int, *, record: str) -> bytes:
    """As `decompress`, for content that must have exactly `size` bytes."""
    content = decompress(frame, size_max=size, record=record)
    if len(content) != size:
        raise FormatError(record, "zstd content size", 0, f"{len(content)}, expected {size}")
    return content


def compress(content: bytes | memoryview, level: int) -> bytes:
    """One frame with content size and without checksum: digests do that work."""
    from zstandard import ZstdCompressor

    return ZstdCompressor(level=level, write_checksum=False, write_content_size=True).compress(
        content
    )
