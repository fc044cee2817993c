"""Signatures that the real programs made, kept in tests/golden/signatures."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imgsnap.digest import Digest, sha256_digest
from imgsnap.trust.cosign import bundle_signature, simple_signature
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.names import Name
from imgsnap.trust.notation import parse_jws
from imgsnap.trust.policy import NotationSigned, SigstoreSigned
from imgsnap.trust.subjects import parse_subject
from imgsnap.trust.target import NotAccepted, Target

FILES = Path(__file__).parents[2] / "golden/signatures"
NAME = Name("docker", "127.0.0.1:56603/golden", "1.0")


@pytest.fixture
def target() -> Target:
    raw = (FILES / "manifest.json").read_bytes()
    return Target(sha256_digest(raw), len(raw), json.loads(raw)["mediaType"])


@pytest.fixture
def other(target: Target) -> Target:
    return replace(target, digest=Digest("sha256:" + "0" * 64))


def by_key(name: str, match: Match) -> SigstoreSigned:
    return SigstoreSigned(((FILES / name).read_bytes(),), SignedIdentity(match))


def test_cosign_2(target, other):
    payload = (FILES / "cosign-2.payload").read_bytes()
    signature = simple_signature(
        payload, (FILES / "cosign-2.signature").read_text().strip(), keyless=False
    )
    ours = by_key("cosign-2.pub", Match.REPOSITORY)
    assert signature.accept(ours, target, NAME)
    for requirement, what, name in (
        (ours, other, NAME),
        (ours, target, replace(NAME, repository="127.0.0.1:56603/other")),
        (by_key("cosign-2.pub", Match.EXACT), target, NAME),
        (by_key("cosign-3.pub", Match.REPOSITORY), target, NAME),
    ):
        with pytest.raises(NotAccepted):
            signature.accept(requirement, what, name)


def test_cosign_3(target, other):
    signature = bundle_signature((FILES / "cosign-3.bundle.json").read_bytes())
    ours = by_key("cosign-3.pub", Match.DIGEST_ONLY)
    assert signature.accept(ours, target, NAME)
    for requirement, what in ((ours, other), (by_key("cosign-2.pub", Match.DIGEST_ONLY), target)):
        with pytest.raises(NotAccepted):
            signature.accept(requirement, what, NAME)


def test_notation(target, other):
    signature = parse_jws((FILES / "notation.jws.json").read_bytes())
    roots = ((FILES / "notation.crt").read_bytes(),)
    subject = parse_subject("x509.subject: C=US, ST=WA, L=Seattle, O=Notary, CN=test.example")
    ours = NotationSigned(roots, (subject,))

    def at(hour: int) -> float:
        return datetime(2026, 11, 22, hour, tzinfo=UTC).timestamp()

    signer = signature.accept(ours, target, lambda: at(12))
    assert signer.until is not None and at(18) < signer.until < at(19)
    with pytest.raises(NotAccepted, match="is of"):
        signature.accept(ours, other, lambda: at(12))
    with pytest.raises(NotAccepted, match="expired"):
        signature.accept(ours, target, lambda: at(19))
