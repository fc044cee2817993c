"""Finds the signatures of a manifest in its repository. Nothing here is verified but digests.

cosign: the tag ``sha256-<hex>.sig``, or referrers; Sigstore bundles and Notary Project signatures:
referrers. distribution-spec 1.1, "Listing Referrers".
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.digest import Digest, digest_hex, sha256_digest
from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    ImgsnapError,
    IntegrityError,
    NotFound,
    Unavailable,
    Unsupported,
)
from imgsnap.oci.manifest import parse_manifest
from imgsnap.oci.media_types import OCI_EMPTY
from imgsnap.oci.repository import Descriptor, RawManifest, Repository
from imgsnap.trust import cosign, notation
from imgsnap.trust.target import NotAccepted, Target

SIGNATURES_MAX = 64
"""Of one manifest: anybody who may push can add more, and each costs two requests."""
BLOB_SIZE_MAX = max(cosign.PAYLOAD_SIZE_MAX, notation.ENVELOPE_SIZE_MAX)
SIMPLE_SIGNING = "application/vnd.dev.cosign.simplesigning.v1+json"
COSIGN_ARTIFACT = "application/vnd.dev.cosign.artifact.sig.v1+json"
NOTATION_ARTIFACT = "application/vnd.cncf.notary.signature"
JWS = "application/jose+json"
COSE = "application/cose"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"
CERTIFICATE_ANNOTATION = "dev.sigstore.cosign/certificate"
_ARTIFACTS = frozenset({COSIGN_ARTIFACT, NOTATION_ARTIFACT, cosign.BUNDLE})
_MAYBE = frozenset({OCI_EMPTY, ""})
"""cosign 3 enters its bundles into the referrers tag with their config's type."""

_NO_SIGNATURE = (NotFound, IntegrityError, Unsupported)
"""What is wrong with one says nothing about the others."""

Signature = cosign.CosignSignature | notation.NotationSignature


class Found(NamedTuple):
    """One signature: what a parser made of it, or why it cannot be judged."""

    kind: str  # "cosign", "cosign bundle", "notation"
    manifest: Digest  # where it is
    signature: Signature | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class _Blob:
    """A signature in a signature manifest."""

    kind: str
    manifest: Digest
    layer: Descriptor


def cosign_tag(subject: Digest) -> str:
    """The tag under which cosign keeps a manifest's signatures."""
    return f"sha256-{digest_hex(subject)}.sig"


def find_signatures(repository: Repository, target: Target) -> list[Found]:
    """All signatures of a manifest, at most SIGNATURES_MAX, in the repository's order.

    One that is damaged or missing has a problem. Raises Unavailable and AccessDenied: then nothing
    is known.
    """
    blobs = [blob for _, raw in _manifests(repository, target.digest) for blob in _blobs(raw)]
    return [_load(repository, blob) for blob in blobs[:SIGNATURES_MAX]]


def signature_manifests(
    repository: Repository, subject: Digest
) -> Iterator[tuple[Digest, str | None]]:
    """What `find_signatures` reads, as it can be copied: digests, and the tags they have. What is
    too large to be a signature is left out."""
    for tag, raw in _manifests(repository, subject):
        blobs = _blobs(raw)
        if blobs and all(blob.layer.size <= BLOB_SIZE_MAX for blob in blobs):
            yield raw.descriptor.digest, tag


def _manifests(repository: Repository, subject: Digest) -> Iterator[tuple[str | None, RawManifest]]:
    """The tag's and the referrers, asked for at the same time."""
    tagged: list[RawManifest | BaseException | None] = []

    def ask_tag() -> None:
        try:
            tagged.append(_tagged(repository, subject))
        except BaseException as error:
            tagged.append(error)

    thread = threading.Thread(target=ask_tag, name="signatures", daemon=True)
    thread.start()
    referrers = _referrers(repository, subject)
    thread.join()
    found = tagged[0]
    if isinstance(found, BaseException):
        raise found
    if found is not None:
        yield cosign_tag(subject), found
    for entry in referrers:
        try:
            yield None, repository.manifest(entry.digest)
        except _NO_SIGNATURE:
            continue  # entries of lists outlive what they name


def _tagged(repository: Repository, subject: Digest) -> RawManifest | None:
    try:
        return repository.manifest(cosign_tag(subject))
    except _NO_SIGNATURE:
        return None


def _referrers(repository: Repository, subject: Digest) -> Sequence[Descriptor]:
    entries = repository.referrers(subject, "")
    wanted = [entry for entry in entries if entry.artifact_type in _ARTIFACTS]
    wanted += [entry for entry in entries if entry.artifact_type in _MAYBE]
    return wanted[:SIGNATURES_MAX]


def _blobs(raw: RawManifest) -> list[_Blob]:
    """The signatures that a manifest lists; none when anything else is in it."""
    try:
        manifest = parse_manifest(raw.raw, media_type=raw.descriptor.media_type)
    except ImgsnapError:
        return []
    kinds = {SIMPLE_SIGNING: "cosign", cosign.BUNDLE: "cosign bundle"}
    if manifest.effective_artifact_type == NOTATION_ARTIFACT:
        kinds = dict.fromkeys((JWS, COSE), "notation")
    if manifest.config.size > BLOB_SIZE_MAX or any(
        layer.media_type not in kinds for layer in manifest.layers
    ):
        return []
    digest = raw.descriptor.digest
    return [_Blob(kinds[layer.media_type], digest, layer) for layer in manifest.layers]


def _load(repository: Repository, blob: _Blob) -> Found:
    kind, manifest = blob.kind, blob.manifest
    if blob.layer.media_type == COSE:
        return Found(kind, manifest, None, "is in a COSE envelope, which is not supported; use JWS")
    try:
        raw = repository.blob(blob.layer, size_max=BLOB_SIZE_MAX)
        if sha256_digest(raw) != blob.layer.digest:
            raise DigestMismatch("signature", blob.layer.digest, sha256_digest(raw))
        return Found(kind, manifest, _parse(kind, blob.layer, raw))
    except (Unavailable, AccessDenied):
        raise
    except (ImgsnapError, NotAccepted) as error:
        return Found(kind, manifest, None, str(error))


def _parse(kind: str, layer: Descriptor, raw: bytes) -> Signature:
    if kind == "notation":
        return notation.parse_jws(raw)
    if kind == "cosign bundle":
        return cosign.bundle_signature(raw)
    keyless = CERTIFICATE_ANNOTATION in layer.annotations
    signature = layer.annotations.get(SIGNATURE_ANNOTATION, "")
    return cosign.simple_signature(raw, signature, keyless=keyless)
