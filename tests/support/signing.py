"""Signatures made by openssl(1), as the specifications say and without any code of ours.

Written from sigstore/cosign specs/SIGNATURE_SPEC.md, the Sigstore bundle and DSSE, and the Notary
Project's JWS envelope: what tests/integration has real cosign and notation make.
"""

import json
import subprocess
from base64 import b64encode, urlsafe_b64encode
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from imgsnap.digest import Digest, sha256_digest
from imgsnap.oci.repository import Descriptor, RawManifest
from tests.support.memory_repository import MemoryRepository

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
COSIGN = "application/vnd.dev.cosign.artifact.sig.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
NOTATION = "application/vnd.cncf.notary.signature"
SUBJECT = "/C=US/ST=WA/O=Example/CN=signer"


def openssl(*arguments: object, stdin: bytes = b"") -> bytes:
    done = subprocess.run(
        ["openssl", *map(str, arguments)], input=stdin, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


@dataclass(frozen=True)
class Key:
    """A private key in a file."""

    path: Path
    kind: str

    @classmethod
    def make(cls, path: Path, kind: str = "ec") -> "Key":
        options = {
            "ec": ("EC", "-pkeyopt", "ec_paramgen_curve:P-256"),
            "ec384": ("EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
            "ec521": ("EC", "-pkeyopt", "ec_paramgen_curve:P-521"),
            "rsa": ("RSA", "-pkeyopt", "rsa_keygen_bits:2048"),
            "rsa3072": ("RSA", "-pkeyopt", "rsa_keygen_bits:3072"),
            "rsa1024": ("RSA", "-pkeyopt", "rsa_keygen_bits:1024"),
            "ed25519": ("ED25519",),
        }[kind]
        openssl("genpkey", "-algorithm", *options, "-out", path)
        return cls(path, kind)

    @property
    def public(self) -> bytes:
        """In PEM form."""
        return openssl("pkey", "-in", self.path, "-pubout")

    def sign(self, message: bytes) -> bytes:
        """As cosign: ECDSA in DER or PKCS #1 v1.5, with SHA-256; Ed25519."""
        if self.kind == "ed25519":
            file = self.path.with_suffix(".message")  # Ed25519 takes no pipe
            file.write_bytes(message)
            return openssl("pkeyutl", "-sign", "-inkey", self.path, "-rawin", "-in", file)
        return openssl("dgst", "-sha256", "-sign", self.path, stdin=message)

    @property
    def algorithm(self) -> str:
        """JWS "alg" of the Notary Project for it."""
        return {"ec": "ES256", "ec384": "ES384", "ec521": "ES512", "rsa": "PS256"}.get(
            self.kind, "PS384"
        )

    def sign_jws(self, message: bytes) -> bytes:
        digest = f"-sha{self.algorithm[2:]}"
        if self.kind.startswith("rsa"):
            pss = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")
            return openssl("dgst", digest, *pss, "-sign", self.path, stdin=message)
        der = openssl("dgst", digest, "-sign", self.path, stdin=message)
        width = {"ec": 32, "ec384": 48, "ec521": 66}[self.kind]
        return b"".join(number.to_bytes(width, "big") for number in _two_integers(der))


def _two_integers(der: bytes) -> list[int]:
    """Of SEQUENCE { INTEGER, INTEGER }."""
    at = 3 if der[1] == 0x81 else 2
    found = []
    while at < len(der):
        length = der[at + 1]
        found.append(int.from_bytes(der[at + 2 : at + 2 + length], "big"))
        at += 2 + length
    return found


@dataclass(frozen=True)
class Chain:
    """A signer's key and its certificates in PEM form, its own first, the root last."""

    key: Key
    certificates: tuple[bytes, ...]

    @property
    def root(self) -> bytes:
        return self.certificates[-1]

    @property
    def x5c(self) -> list[str]:
        return [
            b64encode(openssl("x509", "-outform", "DER", stdin=pem)).decode()
            for pem in self.certificates
        ]


LEAF = ("keyUsage=critical,digitalSignature", "extendedKeyUsage=codeSigning")
AUTHORITY = ("basicConstraints=critical,CA:true", "keyUsage=critical,keyCertSign")
_CA_CONFIG = """[ca]
default_ca=it
[it]
database={0}/index
new_certs_dir={0}
rand_serial=yes
policy=any
default_md={1}
unique_subject=no
[any]
C=optional
ST=optional
O=optional
OU=optional
CN=optional
[exts]
{2}
"""


def certificate(
    directory: Path,
    name: str,
    *,
    issuer: tuple[Key, bytes] | None = None,
    key: str = "ec",
    subject: str = SUBJECT,
    extensions: tuple[str, ...] = LEAF,
    dates: tuple[str, str] = ("20200101000000Z", "20990101000000Z"),
    digest: str = "sha256",
) -> tuple[Key, bytes]:
    """A new key and its certificate in PEM form, of its own or by `issuer`."""
    place = directory / name
    place.mkdir(parents=True)
    made = Key.make(place / "key", key)
    (place / "index").touch()
    (place / "conf").write_text(_CA_CONFIG.format(place, digest, "\n".join(extensions)))
    openssl(
        *("req", "-new", "-key", made.path, "-subj", subject, "-out", place / "csr"),
        *("-config", "/dev/null"),
    )
    signer: list[object] = ["-selfsign", "-keyfile", made.path]
    if issuer is not None:
        (place / "issuer").write_bytes(issuer[1])
        signer = ["-keyfile", issuer[0].path, "-cert", place / "issuer"]
    openssl(
        *("ca", "-batch", "-notext", "-config", place / "conf", "-extensions", "exts"),
        *("-startdate", dates[0], "-enddate", dates[1], "-in", place / "csr"),
        *("-out", place / "crt", *signer),
    )
    return made, (place / "crt").read_bytes()


def chain(directory: Path, key: str = "ec", **leaf: Any) -> Chain:
    """A signer below a root of its own."""
    root = certificate(directory, "root", subject="/C=US/ST=WA/O=Root", extensions=AUTHORITY)
    made, own = certificate(directory, "leaf", issuer=root, key=key, **leaf)
    return Chain(made, (own, root[1]))


# Payloads and envelopes ------------------------------------------------------------------------


def simple_payload(digest: str, reference: str = "registry.test/app") -> bytes:
    critical = {
        "identity": {"docker-reference": reference},
        "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature",
    }
    return json.dumps({"critical": critical, "optional": None}).encode()


def statement(digest: str, predicate: str = "https://sigstore.dev/cosign/sign/v1") -> bytes:
    value = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": digest.removeprefix("sha256:")}, "annotations": {}}],
        "predicateType": predicate,
        "predicate": {},
    }
    return json.dumps(value).encode()


def bundle(key: Key, payload: bytes) -> dict[str, Any]:
    kind = "application/vnd.in-toto+json"
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    envelope = {
        "payload": b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"sig": b64encode(key.sign(message)).decode()}],
    }
    material = {"publicKey": {"hint": "any"}}
    return {"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}


@dataclass(frozen=True)
class Jws:
    """A Notary Project envelope before it is signed."""

    payload: bytes
    protected: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, target: RawManifest, *, expiry: str | None = None, **changes: Any) -> "Jws":
        artifact = {
            "mediaType": target.descriptor.media_type,
            "digest": target.descriptor.digest,
            "size": len(target.raw),
        }
        headers: dict[str, Any] = {
            "cty": "application/vnd.cncf.notary.payload.v1+json",
            "io.cncf.notary.signingScheme": "notary.x509",
            "io.cncf.notary.signingTime": "2026-01-02T03:04:05Z",
            "crit": ["io.cncf.notary.signingScheme"],
        }
        if expiry is not None:
            headers["io.cncf.notary.expiry"] = expiry
            headers["crit"] = [*headers["crit"], "io.cncf.notary.expiry"]
        payload = json.dumps({"targetArtifact": artifact}).encode()
        return cls(payload, headers | changes)

    def signed(self, by: Chain, **changes: Any) -> dict[str, Any]:
        protected = _url(json.dumps({"alg": by.key.algorithm} | self.protected).encode())
        payload = _url(self.payload)
        value = {
            "payload": payload,
            "protected": protected,
            "header": {"x5c": by.x5c, "io.cncf.notary.signingAgent": "test/1"},
            "signature": _url(by.key.sign_jws(f"{protected}.{payload}".encode())),
        }
        return value | changes


def _url(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


# Where signatures are --------------------------------------------------------------------------


@dataclass
class Signatures:
    """Puts signatures of manifests into a repository in memory, where signers would."""

    repository: MemoryRepository

    def cosign(
        self, target: Digest, key: Key, payload: bytes | None = None, *, tag: bool = True
    ) -> None:
        """One more, under cosign's tag or as a referrer."""
        payload = simple_payload(target) if payload is None else payload
        self.signed(target, payload, b64encode(key.sign(payload)).decode(), tag=tag)

    def signed(
        self,
        target: Digest,
        payload: bytes,
        signature: str,
        *,
        tag: bool = True,
        annotations: dict[str, str] | None = None,
    ) -> None:
        layer = self._blob(SIMPLE, payload)
        notes = {"dev.cosignproject.cosign/signature": signature} | (annotations or {})
        layer = layer | {"annotations": notes}
        name = target.replace(":", "-") + ".sig"
        before = self.repository.manifests.get(name) if tag else None
        layers = json.loads(before.raw)["layers"] if before else []
        self._manifest(target, COSIGN, [*layers, layer], tag=name if tag else "")

    def bundle(self, target: Digest, value: dict[str, Any], *, listed_as: str = BUNDLE) -> None:
        layer = self._blob(BUNDLE, json.dumps(value).encode())
        self._manifest(target, BUNDLE, [layer], listed_as=listed_as)

    def notation(
        self, target: Digest, value: dict[str, Any], kind: str = "application/jose+json"
    ) -> None:
        self._manifest(target, NOTATION, [self._blob(kind, json.dumps(value).encode())])

    def _blob(self, media_type: str, data: bytes) -> dict[str, Any]:
        digest = sha256_digest(data)
        self.repository.blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def _manifest(
        self,
        target: Digest,
        kind: str,
        layers: list[dict[str, Any]],
        *,
        tag: str = "",
        listed_as: str | None = None,
    ) -> None:
        value = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": kind,
            "config": self._blob("application/vnd.oci.empty.v1+json", b"{}"),
            "layers": layers,
        }
        raw = json.dumps(value).encode()
        descriptor = Descriptor(MANIFEST, sha256_digest(raw), len(raw))
        self.repository.add_manifest(RawManifest(descriptor, raw), tag)
        if not tag:
            entry = replace(descriptor, artifact_type=kind if listed_as is None else listed_as)
            self.repository.subjects.setdefault(target, []).append(entry)
