"""cosign's signatures by a key: the simple signing payload, and DSSE envelopes in Sigstore bundles.

Formats: sigstore/cosign, specs/SIGNATURE_SPEC.md; sigstore/protobuf-specs, sigstore_bundle.proto
(JSON form of v0.3); secure-systems-lab/dsse, protocol.md; in-toto/attestation,
spec/v1/statement.md.
Raises FormatError for what breaks its format.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imgsnap.errors import FormatError
from imgsnap.oci.manifest import parse_json_object
from imgsnap.trust import base64_text
from imgsnap.trust.keys import public_key
from imgsnap.trust.names import Name
from imgsnap.trust.policy import SigstoreSigned
from imgsnap.trust.target import NotAccepted, Signer, Target

PAYLOAD_SIZE_MAX = 128 << 10
"""Bytes of a payload, or of a bundle; a server may hold find.SIGNATURES_MAX of them."""
SIGNATURE_SIZE_MAX = 1024
SUBJECTS_MAX = 64
"""Of one statement."""
SIMPLE_SIGNING_TYPE = "cosign container image signature"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://sigstore.dev/cosign/sign/v1"
"""Of a signature. A statement of any other type, as an SBOM's, says something else of the image."""
_IN_TOTO = "application/vnd.in-toto+json"
_PAYLOAD = "signature payload"
_RECORD = "Sigstore bundle"


@dataclass(frozen=True, slots=True)
class CosignSignature:
    """One signature, not verified yet: `payload` is believed once a key made `signature` of
    `message`."""

    message: bytes  # what was signed
    payload: bytes
    signature: bytes
    bundle: bool  # the payload is an in-toto statement, else simple signing's
    keyless: bool  # it comes with a certificate

    def accept(self, requirement: SigstoreSigned, target: Target, name: Name) -> Signer:
        """Who signed `target` as `name`. Raises NotAccepted, FormatError, and what `public_key`
        raises."""
        signer = self._signer(requirement.keys)
        signed = None
        if self.bundle:
            check_statement(self.payload, target)
        else:
            signed = check_simple_signing(self.payload, target)
        problem = requirement.identity.problem(name, signed)
        if problem is not None:
            raise NotAccepted(problem)
        return signer

    def _signer(self, keys: Sequence[bytes]) -> Signer:
        for pem in keys:
            key = public_key(pem)
            if key.made(self.signature, self.message):
                return Signer(f"key {key.id}")
        if self.keyless:
            raise NotAccepted("is keyless (a Fulcio certificate's), which is not supported")
        raise NotAccepted("is by another key")


def simple_signature(payload: bytes, annotation: str, *, keyless: bool) -> CosignSignature:
    """From a layer of a signature manifest and its annotation
    ``dev.cosignproject.cosign/signature``."""
    signature = base64_text.standard(annotation, _PAYLOAD, "signature", SIGNATURE_SIZE_MAX)
    return CosignSignature(payload, payload, signature, bundle=False, keyless=keyless)


def bundle_signature(raw: bytes) -> CosignSignature:
    """From a Sigstore bundle. Its log entries and timestamps are not looked at: keys need none."""
    value = parse_json_object(raw, record=_RECORD, size_max=PAYLOAD_SIZE_MAX)
    if value.get("mediaType") != BUNDLE:
        raise _wrong("mediaType", f"is {str(value.get('mediaType'))[:100]!r}, not {BUNDLE}")
    material = _object(value, "verificationMaterial", _RECORD)
    envelope = _object(value, "dsseEnvelope", _RECORD)
    payload_type = envelope.get("payloadType")
    if payload_type != _IN_TOTO:
        raise _wrong("payloadType", f"is {str(payload_type)[:100]!r}, not {_IN_TOTO}")
    signatures = envelope.get("signatures")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise _wrong("signatures", "is not a list of one")
    if not isinstance(signatures[0], dict):
        raise _wrong("signatures[0]", "is not an object")
    payload = base64_text.standard(envelope.get("payload"), _RECORD, "payload", PAYLOAD_SIZE_MAX)
    signature = base64_text.standard(signatures[0].get("sig"), _RECORD, "sig", SIGNATURE_SIZE_MAX)
    message = pre_authentication_encoding(_IN_TOTO.encode(), payload)
    return CosignSignature(
        message, payload, signature, bundle=True, keyless="publicKey" not in material
    )


def pre_authentication_encoding(payload_type: bytes, payload: bytes) -> bytes:
    """What a DSSE signature is a signature of (DSSE v1, "PAE")."""
    return b"DSSEv1 %d %b %d %b" % (len(payload_type), payload_type, len(payload), payload)


def check_simple_signing(payload: bytes, target: Target) -> str:
    """The docker reference that a verified payload gives to `target`. Raises NotAccepted for a
    payload about another manifest."""
    value = parse_json_object(payload, record=_PAYLOAD, size_max=PAYLOAD_SIZE_MAX)
    critical = _object(value, "critical", _PAYLOAD)
    if set(critical) != {"identity", "image", "type"}:
        raise FormatError(_PAYLOAD, "critical", 0, "does not have exactly identity, image and type")
    if critical["type"] != SIMPLE_SIGNING_TYPE:
        raise FormatError(_PAYLOAD, "critical.type", 0, f"is not {SIMPLE_SIGNING_TYPE!r}")
    image = _object(critical, "image", _PAYLOAD)
    identity = _object(critical, "identity", _PAYLOAD)
    reference = identity.get("docker-reference")
    if set(image) != {"docker-manifest-digest"} or set(identity) != {"docker-reference"}:
        raise FormatError(_PAYLOAD, "critical", 0, "has other fields than the format's")
    if not isinstance(reference, str):
        raise FormatError(_PAYLOAD, "critical.identity.docker-reference", 0, "is not a text")
    _check_digest(image["docker-manifest-digest"], target)
    return reference


def check_statement(payload: bytes, target: Target) -> None:
    """Raises NotAccepted for a verified statement that is no signature of `target`."""
    value = parse_json_object(payload, record="statement", size_max=PAYLOAD_SIZE_MAX)
    if value.get("_type") != STATEMENT_TYPE:
        raise FormatError("statement", "_type", 0, f"is not {STATEMENT_TYPE}")
    if value.get("predicateType") != PREDICATE_TYPE:
        kind = str(value.get("predicateType"))[:100]
        raise NotAccepted(f"is an attestation of type {kind!r}, no signature")
    subjects = value.get("subject")
    if not isinstance(subjects, list) or not 0 < len(subjects) <= SUBJECTS_MAX:
        raise FormatError("statement", "subject", 0, f"is not a list of 1 to {SUBJECTS_MAX}")
    digests = []
    for subject in subjects:
        if not isinstance(subject, dict) or not isinstance(subject.get("digest"), dict):
            raise FormatError("statement", "subject.digest", 0, "is not an object")
        digests.append(f"sha256:{subject['digest'].get('sha256')}")
    if target.digest not in digests:
        _check_digest(digests[0], target)


def _check_digest(signed: object, target: Target) -> None:
    if signed != target.digest:
        raise NotAccepted(f"is of {str(signed)[:100]}")


def _object(value: dict[str, Any], name: str, record: str) -> dict[str, Any]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise FormatError(record, name, 0, "is not an object")
    return found


def _wrong(field: str, problem: str) -> FormatError:
    return FormatError(_RECORD, field, 0, problem)
