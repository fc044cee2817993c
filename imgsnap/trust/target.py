"""What is signed, and what judging a signature of it says."""

from dataclasses import dataclass

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import DigestMismatch
from imgsnap.oci.manifest import parse_document
from imgsnap.oci.repository import RawManifest


@dataclass(frozen=True, slots=True)
class Target:
    """A manifest or index, as signatures describe it."""

    digest: Digest
    size: int
    media_type: str

    @classmethod
    def of(cls, raw: RawManifest) -> "Target":
        """Hashes it again: a local store does not. Raises DigestMismatch, and what
        `parse_document` raises."""
        digest = sha256_digest(raw.raw)
        if digest != raw.descriptor.digest:
            raise DigestMismatch("manifest", raw.descriptor.digest, digest)
        media_type = raw.descriptor.media_type or parse_document(raw.raw).media_type
        return cls(digest, len(raw.raw), media_type)


@dataclass(frozen=True, slots=True)
class Signer:
    """Whose signature it is: text for people, and until when it may be remembered."""

    name: str  # "key sha256:…", "certificate CN=…"
    until: float | None = None  # Unix time of the first thing that expires; None: nothing does


class NotAccepted(Exception):
    """Why one signature does not fulfil one requirement; others may."""


def printable(text: str) -> str:
    """Text of a registry's or a signer's for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)
