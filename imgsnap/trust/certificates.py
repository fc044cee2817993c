"""Certificate chains of Notary Project signatures.

Rules: notaryproject/specifications, signature-specification.md, "Certificate Requirements" and
"Algorithm Selection". Parsing and arithmetic are the package cryptography's; that package's own
path validation is for TLS and asks for names of hosts.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.trust.keys import need_cryptography
from imgsnap.trust.target import NotAccepted, printable

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, KeyUsage

_RECORD = "notation signature"
_RSA_ALGORITHMS = {2048: ("PS256", "SHA256"), 3072: ("PS384", "SHA384"), 4096: ("PS512", "SHA512")}
_EC_ALGORITHMS = {
    "secp256r1": ("ES256", "SHA256", 32),
    "secp384r1": ("ES384", "SHA384", 48),
    "secp521r1": ("ES512", "SHA512", 66),
}
"""JWS "alg", its hash, and the bytes of each of the signature's two numbers (RFC 7518, 3.4)."""


def parse_chain(ders: Sequence[bytes]) -> "list[Certificate]":
    """Raises FormatError, Unsupported without the package."""
    need_cryptography()
    from cryptography.x509 import load_der_x509_certificate

    try:
        with warnings.catch_warnings():
            # What RFC 5280 forbids is no certificate. Of this module only: threads share filters.
            warnings.filterwarnings("error", module=__name__)
            chain = [load_der_x509_certificate(der) for der in ders]
            for certificate in chain:  # parsed when they are asked for
                _ = (certificate.subject, certificate.issuer, certificate.extensions)
        return chain
    except Exception as error:  # the parser is another's, and its input hostile
        raise FormatError(_RECORD, "x5c", 0, f"no certificate: {str(error)[:200]}") from error


def check_chain(chain: "Sequence[Certificate]", at: float) -> None:
    """That it is one chain from a signer to a root, each as the specification wants it, valid when
    the signer says that it signed. Raises NotAccepted."""
    try:
        _check_leaf(chain[0])
        for depth, authority in enumerate(chain[1:]):
            _check_authority(authority, depth)
        for certificate, issuer in zip(chain, [*chain[1:], chain[-1]], strict=True):
            _check_issued(certificate, issuer)
    except NotAccepted:
        raise
    except Exception as error:  # of extensions and keys that the parser does not know
        raise NotAccepted(f"its certificates cannot be read: {str(error)[:200]}") from error
    check_valid(chain, at, when="when it was signed")


def _check_issued(certificate: "Certificate", issuer: "Certificate") -> None:
    """A root's issuer is itself."""
    from cryptography.exceptions import InvalidSignature

    used = certificate.signature_hash_algorithm
    if used is None or used.name not in ("sha256", "sha384", "sha512"):
        raise NotAccepted("a certificate is signed with another hash than SHA-2")
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise NotAccepted(f"{subject_text(certificate)} is not issued by the next one") from error


def _key_usage(certificate: "Certificate") -> "KeyUsage":
    from cryptography.x509 import ExtensionNotFound, KeyUsage

    try:
        found = certificate.extensions.get_extension_for_class(KeyUsage)
    except ExtensionNotFound as error:
        raise NotAccepted(f"{subject_text(certificate)} has no key usage") from error
    if not found.critical:
        raise NotAccepted(f"the key usage of {subject_text(certificate)} is not critical")
    return found.value


def _check_leaf(certificate: "Certificate") -> None:
    from cryptography.x509 import BasicConstraints, ExtendedKeyUsage, ExtensionNotFound
    from cryptography.x509.oid import ExtendedKeyUsageOID as Use

    name = subject_text(certificate)
    usage = _key_usage(certificate)
    refused = (
        *(usage.key_encipherment, usage.data_encipherment, usage.key_agreement),
        *(usage.key_cert_sign, usage.crl_sign),
    )
    if not usage.digital_signature or any(refused):
        raise NotAccepted(f"the key usage of {name} is not digitalSignature alone")
    extensions = certificate.extensions
    try:
        if extensions.get_extension_for_class(BasicConstraints).value.ca:
            raise NotAccepted(f"{name} is a certificate authority, and no signer")
    except ExtensionNotFound:
        pass  # optional, as is the next
    try:
        uses = set(extensions.get_extension_for_class(ExtendedKeyUsage).value)
    except ExtensionNotFound:
        return
    others = {
        *(Use.ANY_EXTENDED_KEY_USAGE, Use.SERVER_AUTH, Use.CLIENT_AUTH),
        *(Use.EMAIL_PROTECTION, Use.TIME_STAMPING),
    }
    if uses & others:
        raise NotAccepted(f"{name} is for other uses than signing code")


def _check_authority(certificate: "Certificate", depth: int) -> None:
    """`depth`: how many authorities are between it and the signer."""
    from cryptography.x509 import BasicConstraints, ExtensionNotFound

    name = subject_text(certificate)
    try:
        found = certificate.extensions.get_extension_for_class(BasicConstraints)
    except ExtensionNotFound as error:
        raise NotAccepted(f"{name} has no basic constraints") from error
    if not found.critical or not found.value.ca or not _key_usage(certificate).key_cert_sign:
        raise NotAccepted(f"{name} may not issue certificates")
    if found.value.path_length is not None and depth > found.value.path_length:
        raise NotAccepted(f"{name} may not have so many authorities beneath it")


def made(signer: "Certificate", algorithm: str, signature: bytes, message: bytes) -> bool:
    """Whether `signature` is the signer's of `message`. Raises NotAccepted when the algorithm is
    not the one of its key."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    try:
        key = signer.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise NotAccepted(f"its key cannot be read: {str(error)[:200]}") from error
    try:
        if isinstance(key, rsa.RSAPublicKey) and key.key_size in _RSA_ALGORITHMS:
            wanted, hash_name = _RSA_ALGORITHMS[key.key_size]
            _check_algorithm(algorithm, wanted)
            used = getattr(hashes, hash_name)()
            pss = padding.PSS(padding.MGF1(used), used.digest_size)  # RFC 7518, 3.5
            key.verify(signature, message, pss, used)
        elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _EC_ALGORITHMS:
            wanted, hash_name, width = _EC_ALGORITHMS[key.curve.name]
            _check_algorithm(algorithm, wanted)
            if len(signature) != 2 * width:
                return False
            numbers = (
                int.from_bytes(part, "big") for part in (signature[:width], signature[width:])
            )
            key.verify(
                encode_dss_signature(*numbers), message, ec.ECDSA(getattr(hashes, hash_name)())
            )
        else:
            raise NotAccepted("its key is neither RSA of 2048, 3072, 4096 bits nor on a NIST curve")
    except InvalidSignature:
        return False
    return True


def _check_algorithm(said: str, wanted: str) -> None:
    if said != wanted:
        raise NotAccepted(f"its algorithm is {said[:20]!r}; that of its key is {wanted}")


def check_valid(chain: "Sequence[Certificate]", at: float, *, when: str = "now") -> None:
    """Raises NotAccepted when a certificate is not valid at a time (Unix)."""
    for certificate in chain:
        if at < certificate.not_valid_before_utc.timestamp():
            raise NotAccepted(f"{subject_text(certificate)} is not yet valid {when}")
        if at > ends(certificate):
            raise NotAccepted(f"{subject_text(certificate)} has expired {when}")


def ends(certificate: "Certificate") -> float:
    return certificate.not_valid_after_utc.timestamp()


def check_trusted(chain: "Sequence[Certificate]", roots: Sequence[bytes]) -> None:
    """Raises NotAccepted when none of the chain is in `roots`, and what `parse_roots` raises."""
    trusted = [certificate for root in roots for certificate in parse_roots(root)]
    if not any(certificate in trusted for certificate in chain):
        raise NotAccepted(f"{subject_text(chain[-1])} is not among the trusted roots")


def parse_roots(pem: bytes) -> "list[Certificate]":
    """The certificates of a PEM file. Raises InvalidArgument."""
    need_cryptography()
    from cryptography.x509 import load_pem_x509_certificates

    try:
        return load_pem_x509_certificates(pem)
    except ValueError as error:
        raise InvalidArgument(f"no certificates in PEM form: {str(error)[:200]}") from error


def subject(certificate: "Certificate") -> Mapping[str, list[str]]:
    """The subject's attributes by short name."""
    found: dict[str, list[str]] = {}
    for attribute in certificate.subject:
        value = attribute.value
        text = value if isinstance(value, str) else value.decode("latin-1")
        found.setdefault(_short_name(attribute.oid.dotted_string), []).append(text)
    return found


_SHORT_NAMES = {
    "2.5.4.3": "CN",
    "2.5.4.5": "SERIALNUMBER",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.9": "STREET",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
    "2.5.4.17": "POSTALCODE",
}
"""RFC 4514, section 3, and those that notation knows besides."""


def _short_name(oid: str) -> str:
    return _SHORT_NAMES.get(oid, oid)


def subject_text(certificate: "Certificate") -> str:
    """For messages: the subject as RFC 4514 writes it, without what a terminal could take amiss."""
    return printable(certificate.subject.rfc4514_string()[:200])
