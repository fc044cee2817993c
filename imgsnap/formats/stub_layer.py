"""The stub layer: what a converted image has in place of its layers.

A pure function of the snapshot's digest. It is a valid tar.gz of one small file, so that every
client and registry takes it for a layer, and its diffID is the snapshot's alone: a containerd that
has a layer of this diffID has this snapshot, and no other image shares it.
"""

import struct
import zlib
from dataclasses import dataclass

from imgsnap.digest import Digest, sha256_digest

ANNOTATION = "containerd.io/snapshot/imgsnap.digest"
"""On the stub's descriptor: the snapshot's digest. containerd hands annotations that begin so to
its snapshotters (core/snapshots/snapshotter.go, FilterInheritedLabels)."""
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
NAME = b"imgsnap-stub.txt"
_TEXT = (
    "The files of this image are in the imgsnap snapshot\n"
    "{}\n"
    "This layer is read where containerd unpacks the image without the imgsnap snapshotter:\n"
    "nothing can be run here. Use the image that it was converted from, or install imgsnap.\n"
)
_BLOCK = 512
_GZIP_HEADER = bytes.fromhex("1f8b08000000000000ff")


@dataclass(frozen=True, slots=True)
class StubLayer:
    """The layer of one snapshot's converted image."""

    blob: bytes
    digest: Digest  # of `blob`
    diff_id: Digest  # and chainID: it is an image's only layer


def stub_layer(snapshot: Digest) -> StubLayer:
    """The stub of the snapshot whose manifest has this digest."""
    tar = _tar(_TEXT.format(snapshot).encode())
    blob = _gzip(tar)
    return StubLayer(blob, sha256_digest(blob), sha256_digest(tar))


def _tar(content: bytes) -> bytes:
    """A POSIX ustar archive of one file, 0444 root:root, of 1970."""
    fields = b"".join(
        (
            NAME.ljust(100, b"\0"),
            b"0000444\0" + b"0000000\0" * 2,
            b"%011o\0" % len(content) + b"00000000000\0",
            b" " * 8,
            b"0".ljust(101, b"\0"),
            b"ustar\x0000",
        )
    ).ljust(_BLOCK, b"\0")
    header = fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]
    return header + content.ljust(_BLOCK, b"\0") + bytes(2 * _BLOCK)


def _gzip(data: bytes) -> bytes:
    """One member with one stored block (RFC 1951, 3.2.4): no compressor's version in the bytes."""
    stored = struct.pack("<BHH", 1, len(data), len(data) ^ 0xFFFF) + data
    return _GZIP_HEADER + stored + struct.pack("<II", zlib.crc32(data), len(data))
