"""Public keys of cosign's signatures. All arithmetic is the package cryptography's."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

RSA_BITS_MIN = 2048
RSA_BITS_MAX = 8192
"""Of larger keys each verification takes long."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that cosign signs with: ECDSA on P-256 and RSA (PKCS #1 v1.5) with SHA-256, Ed25519."""

    key: "EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey"
    id: Digest  # SHA-256 of its SubjectPublicKeyInfo in DER

    def made(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` is this key's of `message`."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            if isinstance(self.key, ec.EllipticCurvePublicKey):
                self.key.verify(signature, message, ec.ECDSA(SHA256()))
            elif isinstance(self.key, rsa.RSAPublicKey):
                self.key.verify(signature, message, padding.PKCS1v15(), SHA256())
            else:
                self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


def need_cryptography() -> None:
    """Raises Unsupported when the package is not installed."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise Unsupported(
            "signatures are checked with the Python package cryptography, which is not installed",
            hint="pip install 'imgsnap[trust]'",
        ) from error


@lru_cache(maxsize=256)
def public_key(pem: bytes) -> PublicKey:
    """The key in a PEM file. Raises InvalidArgument, Unsupported for another kind of key."""
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidArgument(
            f"not a public key in PEM form: {str(error)[:200]}",
            hint="cosign public-key --key cosign.key prints one",
        ) from error
    p256 = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == "secp256r1"
    sized = isinstance(key, rsa.RSAPublicKey) and RSA_BITS_MIN <= key.key_size <= RSA_BITS_MAX
    if not p256 and not sized and not isinstance(key, ed25519.Ed25519PublicKey):
        raise Unsupported("keys are ECDSA P-256, RSA of 2048 to 8192 bits, or Ed25519")
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey | ed25519.Ed25519PublicKey)
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return PublicKey(key, sha256_digest(der))
