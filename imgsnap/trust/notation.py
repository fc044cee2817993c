"""Notary Project signatures in JWS envelopes.

notaryproject/specifications: signature-specification.md, signature-envelope-jws.md; RFC 7515.
Signing scheme notary.x509 only. Not done: revocation (OCSP, CRLs), timestamps by a TSA (so a
certificate must be valid now), plugins. What is not known and critical refuses the signature.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from imgsnap.errors import FormatError
from imgsnap.oci.manifest import parse_descriptor, parse_json_object
from imgsnap.trust import base64_text
from imgsnap.trust.policy import NotationSigned
from imgsnap.trust.target import NotAccepted, Signer, Target

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

ENVELOPE_SIZE_MAX = 128 << 10
CERTIFICATES_MAX = 16
CERTIFICATE_SIZE_MAX = 16 << 10
SIGNATURE_SIZE_MAX = 1024
PAYLOAD_TYPE = "application/vnd.cncf.notary.payload.v1+json"
SCHEME = "io.cncf.notary.signingScheme"
SIGNING_TIME = "io.cncf.notary.signingTime"
EXPIRY = "io.cncf.notary.expiry"
_KNOWN = frozenset({SCHEME, EXPIRY})
"""The critical headers that we process."""
_PLUGIN = "io.cncf.notary.verificationPlugin"
_X509 = "notary.x509"
_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_RECORD = "notation signature"


@dataclass(frozen=True, slots=True)
class NotationSignature:
    """One signature, not verified yet: `payload` and the times are believed once the first
    certificate's key made `signature` of `message`."""

    message: bytes
    payload: bytes
    signature: bytes
    algorithm: str  # JWS "alg"
    certificates: tuple[bytes, ...]  # DER: the signer's, then each one's issuer
    signed_at: float  # Unix time, as the signer says
    expires: float | None

    def accept(
        self,
        requirement: NotationSigned,
        target: Target,
        now: Callable[[], float] = time.time,
    ) -> Signer:
        """Who signed `target`. Raises NotAccepted, FormatError, and what `certificates` raises."""
        from imgsnap.trust import certificates

        chain = certificates.parse_chain(self.certificates)
        certificates.check_chain(chain, self.signed_at)
        if not certificates.made(chain[0], self.algorithm, self.signature, self.message):
            raise NotAccepted("its signature does not fit its certificate")
        certificates.check_valid(chain, now())
        certificates.check_trusted(chain, requirement.roots)
        check_payload(self.payload, target)
        if self.expires is not None and now() >= self.expires:
            raise NotAccepted("has expired")
        self._check_subject(requirement, chain)
        ends = [certificates.ends(found) for found in chain]
        until = min(ends if self.expires is None else [*ends, self.expires])
        return Signer(f"certificate {certificates.subject_text(chain[0])}", until)

    def _check_subject(self, requirement: NotationSigned, chain: "Sequence[Certificate]") -> None:
        from imgsnap.trust import certificates

        subject = certificates.subject(chain[0])
        if requirement.subjects and not any(s.matches(subject) for s in requirement.subjects):
            raise NotAccepted(f"is by {certificates.subject_text(chain[0])}, no trusted identity")


def parse_jws(raw: bytes) -> NotationSignature:
    """From a blob of type application/jose+json. Raises FormatError, and NotAccepted for what we
    cannot judge."""
    value = parse_json_object(raw, record=_RECORD, size_max=ENVELOPE_SIZE_MAX)
    if set(value) != {"payload", "protected", "header", "signature"}:
        raise _wrong("document", "does not have exactly payload, protected, header and signature")
    if not isinstance(value["header"], dict):
        raise _wrong("header", "is not an object")
    payload = base64_text.url(value["payload"], _RECORD, "payload", ENVELOPE_SIZE_MAX)
    protected = parse_json_object(
        base64_text.url(value["protected"], _RECORD, "protected", ENVELOPE_SIZE_MAX),
        record=f"{_RECORD}'s protected header",
    )
    _check_protected(protected)
    expires = _time(protected, EXPIRY) if EXPIRY in protected else None
    return NotationSignature(
        message=f"{value['protected']}.{value['payload']}".encode("ascii"),
        payload=payload,
        signature=base64_text.url(value["signature"], _RECORD, "signature", SIGNATURE_SIZE_MAX),
        algorithm=str(protected.get("alg")),
        certificates=_certificates(value["header"].get("x5c")),
        signed_at=_time(protected, SIGNING_TIME),
        expires=expires,
    )


def _check_protected(protected: dict[str, Any]) -> None:
    if protected.get("cty") != PAYLOAD_TYPE:
        raise _wrong("cty", f"is {str(protected.get('cty'))[:100]!r}, not {PAYLOAD_TYPE}")
    critical = protected.get("crit")
    if not isinstance(critical, list) or not all(isinstance(name, str) for name in critical):
        raise _wrong("crit", "is not a list of texts")
    if len(set(critical)) != len(critical) or not set(critical) <= protected.keys():
        raise _wrong("crit", "names a header twice, or one that is not there")
    if SCHEME not in critical or (EXPIRY in protected and EXPIRY not in critical):
        raise _wrong("crit", f"lacks {SCHEME} or {EXPIRY}")
    scheme = protected[SCHEME]
    if scheme != _X509:
        raise NotAccepted(f"has the signing scheme {str(scheme)[:100]!r}; only {_X509} is checked")
    if _PLUGIN in protected:
        raise NotAccepted("asks for a verification plugin")
    unknown = sorted(set(critical) - _KNOWN)
    if unknown:
        raise NotAccepted(f"has a critical header {unknown[0][:100]!r} that is not known")


def _time(protected: dict[str, Any], name: str) -> float:
    text = protected.get(name)
    if not isinstance(text, str) or not _RFC3339.fullmatch(text):
        raise _wrong(name, "is not a time as in RFC 3339")
    try:
        return datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError) as error:
        raise _wrong(name, f"is no time: {text}") from error


def _certificates(value: object) -> tuple[bytes, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= CERTIFICATES_MAX:
        raise _wrong("x5c", f"is not a list of 1 to {CERTIFICATES_MAX} certificates")
    return tuple(
        base64_text.standard(item, _RECORD, f"x5c[{number}]", CERTIFICATE_SIZE_MAX)
        for number, item in enumerate(value)
    )


def check_payload(payload: bytes, target: Target) -> None:
    """Raises NotAccepted for a verified payload about something else than `target`."""
    record = f"{_RECORD}'s payload"
    value = parse_json_object(payload, record=record, size_max=ENVELOPE_SIZE_MAX)
    if set(value) != {"targetArtifact"}:
        raise FormatError(record, "document", 0, "does not have exactly targetArtifact")
    signed = parse_descriptor(value["targetArtifact"], record=record, where="targetArtifact")
    if (signed.digest, signed.size, signed.media_type) != (
        target.digest,
        target.size,
        target.media_type,
    ):
        raise NotAccepted(f"is of {signed.digest} ({signed.size} bytes of {signed.media_type})")


def _wrong(field: str, problem: str) -> FormatError:
    return FormatError(_RECORD, field, 0, problem)
