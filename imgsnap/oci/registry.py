"""A repository of a registry, by distribution-spec 1.1 and by what real servers do.

Reads are here; uploads are in registry_upload, referrers in registry_referrers.
"""

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from imgsnap.digest import Digest, parse_digest, sha256_digest
from imgsnap.errors import (
    DigestMismatch,
    FormatError,
    LimitExceeded,
    Unavailable,
    Unsupported,
)
from imgsnap.oci import registry_upload
from imgsnap.oci.auth import Scope
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.connections import RANGE_TIMEOUT_S
from imgsnap.oci.http_errors import RegistryUnavailable, redact
from imgsnap.oci.http_message import Request, Response
from imgsnap.oci.manifest import Document, describe, parse_document, parse_json_object
from imgsnap.oci.media_types import MANIFEST_ACCEPT
from imgsnap.oci.redirects import absolute_url, same_origin
from imgsnap.oci.reference import parse_tag
from imgsnap.oci.registry_referrers import ReferrerLists
from imgsnap.oci.registry_stream import BlobStream, RangeReader
from imgsnap.oci.repository import (
    MANIFEST_SIZE_MAX,
    ByteStream,
    Descriptor,
    RangeBytes,
    RangeStream,
    RawManifest,
    Repository,
    check_range,
)
from imgsnap.oci.transport import Transport

TAG_PAGE_SIZE = 1000
TAG_PAGES_MAX = 10_000
TAG_PAGE_BYTES_MAX = 16 << 20
"""A registry that ignores paging answers with all its tags at once."""
_LINK = re.compile(r'<([^>]*)>\s*;[^,]*\brel="?next"?', re.IGNORECASE)

_log = logging.getLogger(__name__)


class RegistryRepository:
    """Implements WritableRepository over a Transport, which repositories may share.

    `owns_transport`: close() closes the transport too. `scoped` is its name for token servers.
    Thread safe.
    """

    def __init__(
        self, transport: Transport, repository: str, *, owns_transport: bool = False
    ) -> None:
        self.transport = transport
        self.repository = repository
        self._owns_transport = owns_transport
        self.scoped = transport.endpoint.repository(repository)
        self._pull = Scope.pull(self.scoped)
        self._referrers = ReferrerLists(self)

    @property
    def name(self) -> str:
        """``registry/repository``."""
        return f"{self.transport.registry}/{self.repository}"

    def expect(self, requests: int) -> None:
        self.transport.prepare(requests)

    def url(self, kind: str, item: str) -> str:
        """The path of ``manifests``, ``blobs``, ``tags`` or ``referrers`` of this repository."""
        return f"/v2/{self.repository}/{kind}/{quote(item, safe=':/')}"

    def manifest(self, reference: str) -> RawManifest:
        """The manifest or index with this tag or digest.

        Raises DigestMismatch when the bytes are not those of the digest that was asked for, or
        that the registry claims; FormatError when they are no manifest.
        """
        return self.manifest_document(reference)[0]

    def manifest_document(self, reference: str) -> tuple[RawManifest, Document]:
        """Like manifest(), with the parsed document."""
        wanted = parse_digest(reference) if ":" in reference else None
        if wanted is None:
            parse_tag(reference)
        request = Request(
            "GET",
            self.url("manifests", reference),
            self._pull,
            headers={"Accept": MANIFEST_ACCEPT},
        )
        raw, content_type, claimed = self.transport.exchange(request, _manifest_answer)
        what = f"manifest {self.name}{'@' if wanted else ':'}{reference}"
        got = sha256_digest(raw)
        expected = wanted or claimed
        if expected is not None and got != expected:
            raise DigestMismatch(what, expected, got)
        document = parse_document(raw, media_type=content_type, record=what)
        return RawManifest(describe(raw, document), raw), document

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        """A small blob, whole and verified. Raises LimitExceeded over `size_max` bytes."""
        what = f"blob {descriptor.digest} of {self.name}"
        if descriptor.size > size_max:
            raise LimitExceeded("oci.blob_size_max", descriptor.size, size_max, where=what)
        parts: list[bytes] = []
        with self.open_blob(descriptor) as stream:
            while data := stream.read(1 << 20):
                parts.append(data)
        whole = b"".join(parts)
        got = sha256_digest(whole)
        if got != descriptor.digest:
            raise DigestMismatch(what, descriptor.digest, got)
        return whole

    @contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[ByteStream]:
        """A blob as a stream of exactly `descriptor.size` bytes, resumed when it breaks off.

        Not verified. Raises IntegrityError when the registry's blob has another size.
        """
        stream = BlobStream(self.transport, self._blob_request(descriptor), descriptor, self.name)
        try:
            yield stream
        finally:
            stream.close()

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length) of a blob; not verified. See open_range."""
        with self.open_range(descriptor, offset, length) as stream:
            return stream.read(length)

    @contextmanager
    def open_range(
        self,
        descriptor: Descriptor,
        offset: int,
        length: int,
        *,
        cancellation: Cancellation | None = None,
        second: bool = False,
    ) -> Iterator[RangeStream]:
        """Bytes [offset, offset + length) of a blob as they come in; not verified.

        Raises RangeUnsupported when the answer is another part than asked, or the whole blob (which
        is then not read), and InvalidArgument for a range outside the blob.
        """
        check_range(descriptor, offset, length)
        if length == 0:
            yield RangeBytes(self.transport.host, b"")
            return
        request = replace(
            self._blob_request(descriptor, None, frozenset({200, 206})),
            cancellation=cancellation,
            timeout_s=RANGE_TIMEOUT_S,
        )
        stream = RangeReader(self.transport, request, descriptor, offset, length)
        try:
            yield stream
        finally:
            stream.close()

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the registry has the blob.

        A redirect counts as yes and is not followed: GHCR's signed URLs refuse HEAD with 403.
        """
        request = Request(
            "HEAD",
            self.url("blobs", descriptor.digest),
            self._pull,
            accept=frozenset({200, 204, 302, 303, 307, 404}),
        )
        return self.transport.exchange(request, lambda response: response.status != 404)

    def tags(self, prefix: str = "") -> list[str]:
        """Tags that begin with `prefix`, sorted; empty when the repository does not exist."""
        found: set[str] = set()
        target = f"{self.url('tags', 'list')}?n={TAG_PAGE_SIZE}"
        for _ in range(TAG_PAGES_MAX):
            request = Request("GET", target, self._pull, accept=frozenset({200, 404}))
            status, raw, following = self.transport.exchange(request, _page_answer)
            if status == 404:
                break
            new = set(_tag_names(raw, f"tags of {self.name}"))
            # A server that ignores `last` would send the first page for ever.
            if following is None or (new and new <= found):
                found |= new
                break
            found |= new
            target = following
        return sorted(tag for tag in found if tag.startswith(prefix))

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Manifests whose `subject` is this digest, of this artifact type ("" for every type)."""
        return self._referrers.of(subject, artifact_type)

    def put_blob(self, descriptor: Descriptor, path: Path) -> None:
        """Uploads a file unless the registry has the blob. Raises InvalidArgument for its size."""
        registry_upload.put_file(self, descriptor, path)

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        """Uploads bytes unless the registry has the blob. Raises DigestMismatch."""
        registry_upload.put_bytes(self, descriptor, data)

    def mount_blob(self, descriptor: Descriptor, source: Repository) -> bool:
        """Takes a blob from another repository of the same registry; False when it will not."""
        if not isinstance(source, RegistryRepository):
            return False
        if source.transport.registry != self.transport.registry:
            return False
        return registry_upload.mount(self, descriptor, source.repository)

    def put_manifest(
        self,
        manifest: RawManifest,
        tags: Sequence[str] = (),
        *,
        subject: Digest | None = None,
    ) -> None:
        """Uploads by digest, then under each tag, then makes it findable as a referrer.

        `subject` defaults to the manifest's own.
        """
        for tag in tags:
            parse_tag(tag)
        document = parse_document(manifest.raw, record=f"manifest {manifest.descriptor.digest}")
        if subject is None and document.subject is not None:
            subject = document.subject.digest
        indexed = registry_upload.put_manifest(self, manifest, manifest.descriptor.digest)
        for tag in tags:
            registry_upload.put_manifest(self, manifest, tag)
        if subject is not None and not indexed:
            self._referrers.add(subject, manifest.raw, document)

    def delete_manifest(self, digest: Digest) -> bool:
        """Deletes a manifest and every tag of it; False when it was gone already.

        Its blobs are the registry's own garbage collection's. Raises Unsupported where the
        registry does not allow it.
        """
        request = Request(
            "DELETE",
            self.url("manifests", digest),
            Scope.delete(self.repository),
            accept=frozenset({200, 202, 204, 404}),
        )
        try:
            return self.transport.exchange(request, lambda answer: answer.status != 404)
        except Unsupported as error:
            raise Unsupported(
                f"{self.name} does not delete manifests: {error}",
                hint="allow it in the registry (distribution: storage.delete.enabled), or use "
                "the registry's own retention rules",
            ) from error

    def forget_referrers(self, subject: Digest, gone: Collection[Digest]) -> None:
        """Takes manifests out of the list that a registry without the referrers API has."""
        self._referrers.remove(subject, gone)

    def close(self) -> None:
        """Closes the transport when this repository owns it."""
        if self._owns_transport:
            self.transport.close()

    def _blob_request(
        self,
        descriptor: Descriptor,
        headers: dict[str, str] | None = None,
        accept: frozenset[int] = frozenset({200}),
    ) -> Request:
        return Request(
            "GET",
            self.url("blobs", descriptor.digest),
            self._pull,
            headers=headers or {},
            accept=accept,
            redirect_key=f"{self.repository}@{descriptor.digest}",
        )


def next_page(response: Response) -> str | None:
    """The URL of the following page from the Link header, None on the last page.

    Raises Unavailable for a link to another server.
    """
    match = _LINK.search(response.headers.get("link", "")[:16384])
    if not match:
        return None
    target = absolute_url(response.url, match[1])
    if target is None or not same_origin(target, response.url):
        raise Unavailable(f"{redact(response.url)}: the next page is on another server")
    return target


def _manifest_answer(response: Response) -> tuple[bytes, str, Digest | None]:
    raw = response.body(MANIFEST_SIZE_MAX)
    length = response.content_length
    if length is not None and length != len(raw):
        raise RegistryUnavailable(f"{redact(response.url)}: {len(raw)} of {length} bytes came")
    claimed = response.headers.get("docker-content-digest", "").strip()
    # A claim in another algorithm cannot be checked; the tag alone is no promise of bytes.
    digest = parse_digest(claimed) if re.fullmatch(r"sha256:[0-9a-f]{64}", claimed) else None
    return raw, response.headers.get("content-type", ""), digest


def _page_answer(response: Response) -> tuple[int, bytes, str | None]:
    if response.status == 404:
        return 404, b"", None
    return response.status, response.body(TAG_PAGE_BYTES_MAX), next_page(response)


def _tag_names(raw: bytes, record: str) -> list[str]:
    names = parse_json_object(raw, record=record, size_max=TAG_PAGE_BYTES_MAX).get("tags")
    if names is None:
        return []  # Several registries say null for an empty repository.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FormatError(record, "tags", 0, "is not a list of strings")
    return names
