"""A policy as values: which requirements a snapshot of a name must meet."""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgsnap.digest import Digest, sha256_digest
from imgsnap.oci.manifest import canonical_json
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.names import Name
from imgsnap.trust.subjects import TrustedSubject

ACCEPT_ANYTHING = "insecureAcceptAnything"
REJECT = "reject"
SIGSTORE_SIGNED = "sigstoreSigned"
NOTATION_SIGNED = "imgsnapNotationSigned"
"""Ours: containers-policy.json(5) knows no Notary Project signatures."""


@dataclass(frozen=True, slots=True)
class AcceptAnything:
    """No signature is needed."""

    def to_json(self) -> dict[str, Any]:
        return {"type": ACCEPT_ANYTHING}


@dataclass(frozen=True, slots=True)
class Reject:
    """Nothing is good enough."""

    def to_json(self) -> dict[str, Any]:
        return {"type": REJECT}


@dataclass(frozen=True, slots=True)
class SigstoreSigned:
    """A signature of cosign's by one of these keys (PEM files' bytes) of such an identity."""

    keys: tuple[bytes, ...]
    identity: SignedIdentity

    def to_json(self) -> dict[str, Any]:
        return {
            "type": SIGSTORE_SIGNED,
            "keyDatas": [b64encode(key).decode() for key in self.keys],
            "signedIdentity": _identity_json(self.identity),
        }


@dataclass(frozen=True, slots=True)
class NotationSigned:
    """A Notary Project signature whose chain holds one of the certificates of `roots` (PEM files'
    bytes) and whose signer is one of `subjects`; none: any signer."""

    roots: tuple[bytes, ...]
    subjects: tuple[TrustedSubject, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "type": NOTATION_SIGNED,
            "rootDatas": [b64encode(root).decode() for root in self.roots],
            "trustedIdentities": [str(subject) for subject in self.subjects] or ["*"],
        }


Requirement = AcceptAnything | Reject | SigstoreSigned | NotationSigned
Requirements = tuple[Requirement, ...]
"""Of which all must be met."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Requirements by transport and scope; the narrowest scope that matches decides alone."""

    default: Requirements
    transports: Mapping[str, Mapping[str, Requirements]]

    def requirements(self, name: Name) -> Requirements:
        """What a snapshot of this name must meet."""
        scopes = self.transports.get(name.transport, {})
        for scope in name.scopes():
            if scope in scopes:
                return scopes[scope]
        return self.default

    def to_text(self) -> str:
        """The policy as a file that needs no other: keys and certificates are in it."""
        value = {
            "default": [requirement.to_json() for requirement in self.default],
            "transports": {
                transport: {
                    scope: [requirement.to_json() for requirement in requirements]
                    for scope, requirements in scopes.items()
                }
                for transport, scopes in self.transports.items()
            },
        }
        return canonical_json(value).decode()

    @property
    def digest(self) -> Digest:
        """Of all that decides: another key in the same file is another policy."""
        return sha256_digest(self.to_text().encode())


def _identity_json(identity: SignedIdentity) -> dict[str, str]:
    value = {"type": identity.match.value}
    if identity.match is Match.EXACT_REFERENCE:
        value["dockerReference"] = identity.value
    elif identity.match is Match.EXACT_REPOSITORY:
        value["dockerRepository"] = identity.value
    elif identity.match is Match.REMAP:
        value |= {"prefix": identity.value, "signedPrefix": identity.signed_prefix}
    return value
