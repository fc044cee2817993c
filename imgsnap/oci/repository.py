"""What the rest of the project asks of a place that keeps manifests and blobs.

Implemented by a registry's repository, a local OCI image layout, and archives (read only).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, InvalidArgument
from imgsnap.oci.cancellation import Cancellation

MANIFEST_SIZE_MAX = 4 << 20
"""Largest manifest or index we read: distribution-spec 1.1 asks registries to take 4 MiB."""


@dataclass(frozen=True, slots=True)
class Platform:
    """os/architecture[/variant], as in an OCI image index."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI content descriptor (image-spec, descriptor.md)."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    platform: Platform | None = None
    data: bytes = b""  # the content itself, verified, where the descriptor embeds it


@dataclass(frozen=True, slots=True)
class RawManifest:
    """A manifest's exact bytes with the descriptor that they hash to."""

    descriptor: Descriptor
    raw: bytes


class RangeUnsupported(ImgsnapError):
    """The server ignores Range requests; fetch the whole blob instead."""


class ByteStream(Protocol):
    """A blob being read from its start."""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; b"" at the end. Raises Unavailable when the transfer breaks."""


class RangeStream(Protocol):
    """Part of a blob, being read from its start."""

    @property
    def host(self) -> str:
        """Who sends it, for the counters."""

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes as soon as they are here; fewer at the end of the part only.

        Raises Unavailable when the transfer breaks, and what `Repository.open_range` raises.
        """

    def reject(self) -> None:
        """The bytes turned out to be damaged: another host is asked first for a while."""


class RangeBytes:
    """A RangeStream of bytes that are here already."""

    def __init__(self, host: str, data: bytes) -> None:
        self.host = host
        self._data = data
        self._offset = 0

    def read(self, size: int) -> bytes:
        start, self._offset = self._offset, self._offset + size
        return self._data[start : start + size]

    def reject(self) -> None:
        """Nothing to be done: there is no other host."""


def check_range(descriptor: Descriptor, offset: int, length: int) -> None:
    """Raises InvalidArgument for a range outside the blob."""
    if offset < 0 or length < 0 or offset + length > descriptor.size:
        raise InvalidArgument(f"bytes [{offset}, {offset + length}) of a blob of {descriptor.size}")


class Repository(Protocol):
    """Reads. Every method raises NotFound, AccessDenied, Unavailable or IntegrityError."""

    @property
    def name(self) -> str:
        """For messages: ``registry.example/team/app`` or ``oci:/path``."""

    def expect(self, requests: int) -> None:
        """So many reads will be asked for at once, soon: what can be got ready for them is.

        Returns at once, and raises nothing.
        """

    def manifest(self, reference: str) -> RawManifest:
        """The manifest or index with this tag or digest; a digest is verified."""

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        """A small blob, whole and verified. Raises LimitExceeded over `size_max` bytes."""

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[ByteStream]:
        """A blob as a stream. NOT verified: the caller hashes what it reads."""

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length) of a blob; not verified.

        Raises RangeUnsupported when the server sends the whole blob instead.
        """

    def open_range(
        self,
        descriptor: Descriptor,
        offset: int,
        length: int,
        *,
        cancellation: Cancellation | None = None,
        second: bool = False,
    ) -> AbstractContextManager[RangeStream]:
        """As `read_range`, in pieces. `cancellation` ends it from another thread. `second` says
        that another request for these bytes is under way: another host is preferred."""

    def has_blob(self, descriptor: Descriptor) -> bool: ...

    def tags(self, prefix: str = "") -> list[str]:
        """Tags that begin with `prefix`, sorted; empty when the repository does not exist."""

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Manifests whose `subject` is this digest, of this artifact type; "" is every type."""

    def close(self) -> None: ...


class WritableRepository(Repository, Protocol):
    """Writes. A blob or manifest that exists already is left alone."""

    def put_blob(self, descriptor: Descriptor, path: Path) -> None:
        """Stores a file as a blob; its digest has been computed by the caller."""

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None: ...

    def mount_blob(self, descriptor: Descriptor, source: Repository) -> bool:
        """Takes a blob from another repository without moving its bytes through this process.

        False when that is impossible here; the caller then copies.
        """

    def put_manifest(
        self,
        manifest: RawManifest,
        tags: Sequence[str] = (),
        *,
        subject: Digest | None = None,
    ) -> None:
        """Stores a manifest, tags it, and makes it findable as a referrer of `subject`."""
