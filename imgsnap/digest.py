"""Digests: OCI digest strings (``sha256:<hex>``) and raw BLAKE3-256 chunk ids."""

import hashlib
import re
from collections.abc import Iterable
from typing import NewType

from imgsnap.errors import InvalidArgument

Digest = NewType("Digest", str)
"""An OCI digest, ``algorithm:hex``; only sha256 is accepted for blobs and manifests."""

ChunkId = NewType("ChunkId", bytes)
"""BLAKE3-256 of a chunk's uncompressed bytes, 32 bytes."""

DIGEST_BYTES = 32
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def parse_digest(text: str, *, what: str = "digest") -> Digest:
    """Checks that `text` is a sha256 OCI digest.

    Raises InvalidArgument otherwise; `what` names the field in the message.
    """
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise InvalidArgument(f"{what}: {str(text)[:100]!r} is not a sha256 digest")
    return Digest(text)


def as_digest(text: str) -> Digest | None:
    """The digest that a reference is, None for a tag."""
    try:
        return parse_digest(text)
    except InvalidArgument:
        return None


def sha256_digest(data: bytes | memoryview) -> Digest:
    """The OCI digest of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_from_raw(raw: bytes) -> Digest:
    """The OCI digest whose 32 raw bytes are `raw`."""
    return Digest("sha256:" + raw.hex())


def digest_to_raw(digest: Digest) -> bytes:
    """The 32 raw bytes of an OCI digest."""
    return bytes.fromhex(digest[7:])


def digest_hex(digest: Digest) -> str:
    """The hex part of an OCI digest."""
    return digest[7:]


def chain_ids(diff_ids: Iterable[Digest]) -> list[Digest]:
    """Of each layer and all beneath it, bottom first: image-spec, config.md, "Layer ChainID"."""
    chain: list[Digest] = []
    for diff_id in diff_ids:
        chain.append(sha256_digest(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain


def chunk_id(data: bytes | memoryview) -> ChunkId:
    """The id of a chunk: BLAKE3-256 of its uncompressed bytes."""
    from blake3 import blake3

    return ChunkId(blake3(data).digest())
