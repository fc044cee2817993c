"""The parsers of policies and signatures, which meet what anybody may push."""

import json
from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from pathlib import Path

from imgsnap.digest import sha256_digest
from imgsnap.trust import certificates
from imgsnap.trust.cosign import bundle_signature, check_simple_signing, check_statement
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.names import Name
from imgsnap.trust.notation import parse_jws
from imgsnap.trust.policy import NotationSigned, SigstoreSigned
from imgsnap.trust.policy_parse import parse_policy
from imgsnap.trust.subjects import parse_subject
from imgsnap.trust.target import NotAccepted
from imgsnap.trust.target import Target as SignedTarget
from tests.fuzz.harness import JSON_WORDS, target

SIGNATURES = Path(__file__).parents[1] / "golden/signatures"


def signed_things() -> tuple[SignedTarget, Name, tuple[bytes, ...]]:
    """What the kept signatures are of, and the keys that made them."""
    raw = (SIGNATURES / "manifest.json").read_bytes()
    name = Name("docker", "127.0.0.1:56603/golden", "1.0")
    keys = tuple((SIGNATURES / f"cosign-{n}.pub").read_bytes() for n in (2, 3))
    return SignedTarget(sha256_digest(raw), len(raw), json.loads(raw)["mediaType"]), name, keys


def policies() -> list[bytes]:
    key = b64encode((SIGNATURES / "cosign-2.pub").read_bytes()).decode()
    root = b64encode((SIGNATURES / "notation.crt").read_bytes()).decode()
    remap = {"type": "remapIdentity", "prefix": "a.test", "signedPrefix": "b.test"}
    requirements = [
        {"type": "sigstoreSigned", "keyData": key, "signedIdentity": remap},
        {"type": "sigstoreSigned", "keyPaths": ["k"], "signedIdentity": {"type": "matchExact"}},
        {
            "type": "imgsnapNotationSigned",
            "rootDatas": [root],
            "trustedIdentities": ["x509.subject: C=US, ST=a\\,b, O=x"],
        },
    ]
    scopes = {"a.test:5000/x:1": requirements[:1], "*.test": [{"type": "reject"}], "": requirements}
    transports = {"docker": scopes, "oci": {"/a": [{"type": "insecureAcceptAnything"}]}}
    return [json.dumps({"default": requirements, "transports": transports}).encode()]


@target("policy", seeds=policies, words=(*JSON_WORDS, b"x509.subject: ", b"\\", b"*."))
def _(data: bytes) -> None:
    pem = (SIGNATURES / "cosign-2.pub").read_bytes()
    policy = parse_policy(data, lambda name: pem)
    assert parse_policy(policy.to_text().encode(), lambda name: b"") == policy
    policy.requirements(Name("docker", "a.test:5000/x", "1"))


@target(
    "simple-signing",
    seeds=lambda: [(SIGNATURES / "cosign-2.payload").read_bytes()],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    with suppress(NotAccepted):
        check_simple_signing(data, signed_things()[0])
    with suppress(NotAccepted):
        check_statement(data, signed_things()[0])


@target(
    "sigstore-bundle",
    seeds=lambda: [(SIGNATURES / "cosign-3.bundle.json").read_bytes()],
    words=JSON_WORDS,
)
def _(data: bytes) -> None:
    """No change of a genuine bundle is accepted, unless it says the same."""
    what, name, keys = signed_things()
    signature = bundle_signature(data)
    requirement = SigstoreSigned(keys, SignedIdentity(Match.DIGEST_ONLY))
    with suppress(NotAccepted):
        signature.accept(requirement, what, name)
        genuine = bundle_signature((SIGNATURES / "cosign-3.bundle.json").read_bytes())
        assert signature.payload == genuine.payload


@target(
    "notation-jws",
    seeds=lambda: [(SIGNATURES / "notation.jws.json").read_bytes()],
    words=JSON_WORDS,
    cost=3,
)
def _(data: bytes) -> None:
    """The same of an envelope, at a time when it was valid."""
    roots = ((SIGNATURES / "notation.crt").read_bytes(),)
    with suppress(NotAccepted):
        signature = parse_jws(data)
        genuine = parse_jws((SIGNATURES / "notation.jws.json").read_bytes())
        signature.accept(NotationSigned(roots, ()), signed_things()[0], lambda: genuine.signed_at)
        assert (signature.message, signature.expires) == (genuine.message, genuine.expires)


@target("notation-headers", seeds=lambda: [_headers()], words=(*JSON_WORDS, b'"crit":[]'))
def _(data: bytes) -> None:
    """What a signer, but nobody we trust, put into the envelope's protected header."""
    value = json.loads((SIGNATURES / "notation.jws.json").read_bytes())
    protected = urlsafe_b64encode(data).decode().rstrip("=")
    with suppress(NotAccepted):
        parse_jws(json.dumps(value | {"protected": protected}).encode())


def _headers() -> bytes:
    text = json.loads((SIGNATURES / "notation.jws.json").read_bytes())["protected"]
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


@target(
    "certificates", seeds=lambda: [_certificate()], words=(b"\x30\x82", b"\x06\x03\x55\x1d\x0f")
)
def _(data: bytes) -> None:
    with suppress(NotAccepted):
        chain = certificates.parse_chain([data])
        certificates.check_chain(chain, 0.0)


def _certificate() -> bytes:
    value = json.loads((SIGNATURES / "notation.jws.json").read_bytes())
    return b64decode(value["header"]["x5c"][0])


@target(
    "trusted-subject",
    seeds=lambda: [b"x509.subject: C=US, ST=WA, O=a\\, b, CN=\\ x"],
    words=(b"\\ ", b"\\,", b"x509.subject:", b"=", b", O="),
)
def _(data: bytes) -> None:
    subject = parse_subject(data.decode("utf-8", "replace"))
    assert parse_subject(str(subject)) == subject
