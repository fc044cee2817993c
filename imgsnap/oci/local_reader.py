"""Reads manifests, tags, blobs and referrers where all blobs are local files."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from imgsnap.digest import Digest, parse_digest, sha256_digest
from imgsnap.errors import (
    DigestMismatch,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    InvalidReference,
    LimitExceeded,
    NotFound,
)
from imgsnap.oci.blob_files import BlobFile, BlobFiles, FileStream
from imgsnap.oci.cancellation import Cancellation
from imgsnap.oci.manifest import (
    Document,
    ImageIndex,
    describe,
    parse_document,
    parse_index,
    referrer_descriptor,
)
from imgsnap.oci.media_types import (
    INDEXES,
    LAYER_TAG_PREFIX,
    MANIFESTS,
    OCI_INDEX,
    REF_NAME,
)
from imgsnap.oci.reference import DEFAULT_TAG
from imgsnap.oci.registry_referrers import fallback_tag
from imgsnap.oci.repository import (
    MANIFEST_SIZE_MAX,
    ByteStream,
    Descriptor,
    RangeBytes,
    RangeStream,
    RawManifest,
    check_range,
)

REFERRERS_CACHED_MAX = 65_536
"""Parsed manifests remembered by digest; they cannot change under their digest."""
NAMES_SHOWN_MAX = 10

_log = logging.getLogger(__name__)


class LocalReader:
    """Implements Repository over BlobFiles. Thread safe.

    `verify` False skips hashing in manifest() and blob(), for a store whose blobs were verified
    when they were written.
    """

    def __init__(self, files: BlobFiles, *, verify: bool = True) -> None:
        self._files = files
        self._verify = verify
        self._lock = threading.Lock()
        self._parsed_index: tuple[bytes, ImageIndex] | None = None
        self._referrer_cache: OrderedDict[Digest, tuple[Digest | None, Descriptor]] = OrderedDict()

    @property
    def name(self) -> str:
        """The location as the user writes it, without a tag: ``oci:/path``."""
        return self._files.name

    def expect(self, requests: int) -> None:
        """Nothing is far away."""

    def manifest(self, reference: str) -> RawManifest:
        """The manifest or index with this name or digest.

        Raises NotFound, DigestMismatch, FormatError or LimitExceeded.
        """
        return self._load(self._resolve(reference))[0]

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        """A small blob, whole and verified. Raises LimitExceeded over `size_max` bytes."""
        what = f"blob {descriptor.digest} of {self.name}"
        if descriptor.size > size_max:
            raise LimitExceeded("oci.blob_size_max", descriptor.size, size_max, where=what)
        with FileStream(self._open(descriptor)) as stream:
            data = stream.read(descriptor.size)
        if self._verify:
            _check_digest(data, descriptor.digest, what)
        return data

    def open_blob(self, descriptor: Descriptor) -> AbstractContextManager[ByteStream]:
        """A blob as a stream. Not verified."""
        return FileStream(self._open(descriptor))

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length) of a blob; not verified.

        Raises InvalidArgument for a range outside the blob.
        """
        check_range(descriptor, offset, length)
        file = self._open(descriptor)
        try:
            return file.read_at(offset, length) if length else b""
        finally:
            file.close()

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
        """As `read_range`: a file is read at once."""
        yield RangeBytes(self.name, self.read_range(descriptor, offset, length))

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the blob is there with the descriptor's size; its bytes are not hashed."""
        file = self._files.find(descriptor.digest)
        if file is None:
            return False
        file.close()
        return file.size == descriptor.size

    def tags(self, prefix: str = "") -> list[str]:
        """Names of index.json that begin with `prefix`, sorted."""
        names = {entry.annotations.get(REF_NAME, "") for entry in self._index().manifests}
        return sorted(name for name in names if name and name.startswith(prefix))

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """Manifests of index.json whose `subject` is this digest, of a type ("" for every type).

        Also reads the fallback tag that a copy from a registry without the API leaves behind.
        """
        found: dict[Digest, Descriptor] = {}
        tag = fallback_tag(subject)
        for entry in self._index().manifests:
            for candidate in self._candidates(entry, tag):
                refers_to, described = self._referrer(candidate)
                if refers_to == subject and artifact_type in ("", described.artifact_type):
                    found.setdefault(described.digest, described)
        return list(found.values())

    def default_reference(self) -> str:
        """What a location without a name means: "latest" if there is one, else the only image.

        Raises NotFound for an empty layout, InvalidReference when there are several images.
        """
        entries = self._index().manifests
        names = [name for name in self.tags() if not name.startswith(LAYER_TAG_PREFIX)]
        if DEFAULT_TAG in names:
            return DEFAULT_TAG
        images = [entry for entry in entries if not entry.artifact_type]
        named = [entry for entry in images or entries if REF_NAME in entry.annotations]
        # An index's parts are listed without names; the named one is what the user means.
        digests = {entry.digest for entry in named or images or entries}
        if not digests:
            raise NotFound(f"{self.name} holds no image")
        if len(digests) > 1:
            shown = ", ".join(names[:NAMES_SHOWN_MAX]) or "none of them named"
            raise InvalidReference(
                f"{self.name} holds {len(digests)} images: name one", hint=f"it has: {shown}"
            )
        return digests.pop()

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def _index(self) -> ImageIndex:
        raw = self._files.index()
        with self._lock:
            if self._parsed_index is None or self._parsed_index[0] != raw:
                index = parse_index(raw, media_type=OCI_INDEX, record=f"{self.name} index.json")
                self._parsed_index = (raw, index)
            return self._parsed_index[1]

    def _resolve(self, reference: str) -> Digest:
        if reference.startswith("sha256:"):
            with suppress(InvalidArgument):
                return parse_digest(reference)
        for entry in self._index().manifests:
            if entry.annotations.get(REF_NAME) == reference:
                return entry.digest
        names = [name for name in self.tags() if not name.startswith(LAYER_TAG_PREFIX)]
        entries = self._index().manifests
        if reference == DEFAULT_TAG and len(entries) == 1 and not names:
            # An unnamed image that is alone is what everyone means by the layout's name.
            return entries[0].digest
        shown = ", ".join(names[:NAMES_SHOWN_MAX]) + (", …" if len(names) > NAMES_SHOWN_MAX else "")
        raise NotFound(f"{self.name} has no {reference[:300]!r}", hint=f"it has: {shown or 'none'}")

    def _load(self, digest: Digest) -> tuple[RawManifest, Document]:
        what = f"manifest {digest} of {self.name}"
        file = self._files.find(digest)
        if file is None:
            raise NotFound(f"{what} is not there")
        with FileStream(file) as stream:
            if file.size > MANIFEST_SIZE_MAX:
                raise LimitExceeded(
                    "oci.manifest_size_max", file.size, MANIFEST_SIZE_MAX, where=what
                )
            raw = stream.read(file.size)
        if self._verify:
            _check_digest(raw, digest, what)
        document = parse_document(raw, record=what)
        descriptor = describe(raw, document)
        if descriptor.digest != digest:
            raise DigestMismatch(what, digest, descriptor.digest)
        return RawManifest(descriptor, raw), document

    def _open(self, descriptor: Descriptor) -> BlobFile:
        file = self._files.find(descriptor.digest)
        if file is None:
            raise NotFound(f"blob {descriptor.digest} is not in {self.name}")
        if file.size != descriptor.size:
            file.close()
            raise IntegrityError(
                f"blob {descriptor.digest} of {self.name} has {file.size} bytes, "
                f"its descriptor says {descriptor.size}"
            )
        return file

    def _candidates(self, entry: Descriptor, tag: str) -> tuple[Descriptor, ...]:
        if entry.annotations.get(REF_NAME) != tag or entry.media_type not in INDEXES:
            return (entry,) if entry.media_type in MANIFESTS | INDEXES else ()
        document = self._load(entry.digest)[1]
        return document.manifests if isinstance(document, ImageIndex) else ()

    def _referrer(self, entry: Descriptor) -> tuple[Digest | None, Descriptor]:
        """The subject of an entry, from the manifest: other tools drop what index.json adds."""
        with self._lock:
            cached = self._referrer_cache.get(entry.digest)
        if cached is not None:
            return cached
        try:
            raw, document = self._load(entry.digest)
        except ImgsnapError as error:
            # One bad manifest must not hide the referrers of all others.
            _log.warning("%s: ignoring %s: %s", self.name, entry.digest, error)
            return None, entry
        subject = document.subject.digest if document.subject is not None else None
        result = (subject, referrer_descriptor(raw.raw, document))
        with self._lock:
            self._referrer_cache[entry.digest] = result
            if len(self._referrer_cache) > REFERRERS_CACHED_MAX:
                self._referrer_cache.popitem(last=False)
        return result


def _check_digest(data: bytes, digest: Digest, what: str) -> None:
    got = sha256_digest(data)
    if got != digest:
        raise DigestMismatch(what, digest, got)
