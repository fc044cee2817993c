"""cosign's signatures, made by openssl: whose and of what they are believed to be."""

import json
from base64 import b64encode

import pytest

from imgsnap.digest import sha256_digest
from imgsnap.errors import InvalidArgument, Unsupported
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.trust.find import (
    BLOB_SIZE_MAX,
    SIGNATURES_MAX,
    find_signatures,
    signature_manifests,
)
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.judge import Judge, Verdict
from imgsnap.trust.keys import public_key
from imgsnap.trust.names import Name
from imgsnap.trust.policy import SigstoreSigned
from imgsnap.trust.target import Target
from tests.support.signing import MANIFEST, Key, bundle, simple_payload, statement

REPOSITORY = SignedIdentity(Match.REPOSITORY)
DIGEST_ONLY = SignedIdentity(Match.DIGEST_ONLY)


@pytest.fixture
def judged(snapshot, repository, key):
    """What comes of asking for a signature by our key."""

    def judge(identity=REPOSITORY, keys=(key,), reference: str = "latest") -> Verdict:
        name = Name.of(repository.name, reference)
        judge = Judge(repository, name, [Target.of(snapshot.manifest)])
        return judge.judge((SigstoreSigned(tuple(k.public for k in keys), identity),))

    return judge


@pytest.mark.parametrize("tag", [True, False])
@pytest.mark.parametrize("kind", ["ec", "rsa", "ed25519"])
def test_a_signature_by_the_key_is_accepted(kind, tag, keys, snapshot, signatures, judged):
    path = keys / kind
    own = Key(path, kind) if path.exists() else Key.make(path, kind)
    signatures.cosign(snapshot.digest, own, tag=tag)
    verdict = judged(keys=(own,))
    assert verdict.accepted and verdict.until is None
    (signer,) = verdict.signers
    assert signer.name == f"key {public_key(own.public).id}"


def test_no_signature(judged):
    verdict = judged()
    assert not verdict.accepted and "no signature of cosign's" in verdict.reason


def test_another_key(snapshot, signatures, other_key, key, judged):
    signatures.cosign(snapshot.digest, other_key)
    verdict = judged()
    assert not verdict.accepted and "by another key" in verdict.reason
    assert judged(keys=(key, other_key)).accepted


def test_one_good_signature_among_others_is_enough(snapshot, signatures, key, other_key, judged):
    signatures.signed(snapshot.digest, b"\xff", "not base64!")
    signatures.cosign(snapshot.digest, other_key)
    signatures.cosign(snapshot.digest, key)
    assert judged().accepted


def test_a_signature_of_another_manifest(snapshot, signatures, key, judged):
    """Replayed: genuine, and put beside a manifest that it does not name."""
    signatures.cosign(snapshot.digest, key, simple_payload("sha256:" + "ab" * 32))
    verdict = judged()
    assert not verdict.accepted and "is of sha256:abab" in verdict.reason


def test_a_payload_that_was_changed_after_signing(snapshot, signatures, key, judged):
    genuine = simple_payload("sha256:" + "ab" * 32)
    signature = b64encode(key.sign(genuine)).decode()
    signatures.signed(snapshot.digest, simple_payload(snapshot.digest), signature)
    assert not judged().accepted


def test_a_blob_that_is_not_what_its_digest_says(snapshot, repository, signatures, key, judged):
    signatures.cosign(snapshot.digest, key)
    good = simple_payload(snapshot.digest)
    for digest, data in repository.blobs.items():
        if data == good:
            repository.blobs[digest] = good.replace(b"null", b"{} ")
    verdict = judged()
    assert not verdict.accepted and "digest" in verdict.reason


@pytest.mark.parametrize(
    "payload",
    [
        b"[]",
        b'{"critical": 1}',
        b'{"critical": {"identity": {"docker-reference": "a"}, "type": "x"}}',
        b'{"critical": {}, "critical": {}}',
    ],
)
def test_a_signed_payload_of_another_form(payload, snapshot, signatures, key, judged):
    signatures.cosign(snapshot.digest, key, payload)
    assert not judged().accepted


@pytest.mark.parametrize("change", ["type", "image", "more"])
def test_a_signed_payload_of_another_meaning(change, snapshot, signatures, key, judged):
    good = simple_payload(snapshot.digest)
    changed = {
        "type": good.replace(b"cosign container image signature", b"atomic container signature"),
        "image": good.replace(b"docker-manifest-digest", b"docker-manifest"),
        "more": good.replace(b'"type"', b'"unless": "revoked", "type"'),
    }[change]
    assert changed != good
    signatures.cosign(snapshot.digest, key, changed)
    assert not judged().accepted


def test_keyless_signatures_say_so(snapshot, signatures, other_key, judged):
    payload = simple_payload(snapshot.digest)
    signature = b64encode(other_key.sign(payload)).decode()
    notes = {"dev.sigstore.cosign/certificate": "-----BEGIN CERTIFICATE-----"}
    signatures.signed(snapshot.digest, payload, signature, annotations=notes)
    verdict = judged()
    assert not verdict.accepted and "keyless" in verdict.reason


# Bundles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed_as", [None, "", "application/vnd.oci.empty.v1+json"])
def test_a_bundle_is_accepted_for_its_digest(listed_as, snapshot, signatures, key, judged):
    """cosign 3 lists its bundles with their config's type where the registry has no API."""
    made = bundle(key, statement(snapshot.digest))
    signatures.bundle(
        snapshot.digest, made, **({} if listed_as is None else {"listed_as": listed_as})
    )
    assert judged(DIGEST_ONLY).accepted
    refused = judged(REPOSITORY)
    assert not refused.accepted and "names no repository" in refused.reason


def test_an_attestation_is_no_signature(snapshot, signatures, key, judged):
    """By the same key, about the same image: an SBOM, or that it is vulnerable."""
    made = bundle(key, statement(snapshot.digest, "https://spdx.dev/Document"))
    signatures.bundle(snapshot.digest, made)
    verdict = judged(DIGEST_ONLY)
    assert not verdict.accepted and "attestation" in verdict.reason


def test_a_bundle_of_another_manifest_or_key(snapshot, signatures, key, other_key, judged):
    signatures.bundle(snapshot.digest, bundle(key, statement("sha256:" + "ab" * 32)))
    signatures.bundle(snapshot.digest, bundle(other_key, statement(snapshot.digest)))
    assert not judged(DIGEST_ONLY).accepted


def test_bundles_that_are_not_what_was_signed(snapshot, signatures, key, judged):
    good = bundle(key, statement(snapshot.digest))
    envelope = good["dsseEnvelope"]
    unsigned = bundle(key, b"{}")["dsseEnvelope"]["signatures"]
    for changed in (
        good | {"mediaType": "application/vnd.dev.sigstore.bundle.v0.1+json"},
        good | {"dsseEnvelope": envelope | {"payloadType": "application/json"}},
        good | {"dsseEnvelope": envelope | {"signatures": []}},
        good | {"dsseEnvelope": envelope | {"signatures": envelope["signatures"] * 2}},
        good | {"dsseEnvelope": envelope | {"signatures": unsigned}},
        good | {"dsseEnvelope": envelope | {"payload": envelope["payload"] + "\n"}},
        {k: v for k, v in good.items() if k != "verificationMaterial"},
        {k: v for k, v in good.items() if k != "dsseEnvelope"},
    ):
        signatures.repository.subjects.clear()
        signatures.bundle(snapshot.digest, changed)
        assert not judged(DIGEST_ONLY).accepted, changed


# Keys and lists --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rsa1024", "ec384"])
def test_keys_that_are_not_taken(kind, tmp_path):
    with pytest.raises(Unsupported, match="P-256"):
        public_key(Key.make(tmp_path / kind, kind).public)


def test_something_that_is_no_key(key):
    for text in (b"", b"nonsense", key.path.read_bytes()):
        with pytest.raises(InvalidArgument):
            public_key(text)


def test_only_so_many_signatures_are_looked_at(snapshot, repository, signatures, other_key):
    signature = b64encode(other_key.sign(b"x")).decode()
    for number in range(SIGNATURES_MAX + 9):
        signatures.signed(snapshot.digest, b"%d" % number, signature, tag=number % 2 == 0)
    found = find_signatures(repository, Target.of(snapshot.manifest))
    assert len(found) == SIGNATURES_MAX
    assert repository.count("blob") == SIGNATURES_MAX


def test_what_is_too_large_for_a_signature_is_not_copied(snapshot, repository, signatures, key):
    """A pull takes signatures along: nobody shall make it carry anything else."""
    signatures.cosign(snapshot.digest, key)
    target = Target.of(snapshot.manifest)
    (copied,) = signature_manifests(repository, snapshot.digest)
    assert copied[1] == f"sha256-{snapshot.digest[7:]}.sig"
    good = repository.manifests[copied[0]].raw
    for change in (
        lambda value: value["layers"][0].update(size=BLOB_SIZE_MAX + 1),
        lambda value: value["config"].update(size=BLOB_SIZE_MAX + 1),
        lambda value: value["layers"].append(value["layers"][0] | {"mediaType": "text/plain"}),
        lambda value: value["layers"].clear(),
    ):
        value = json.loads(good)
        change(value)
        raw = json.dumps(value).encode()
        descriptor = Descriptor(MANIFEST, sha256_digest(raw), len(raw))
        repository.add_manifest(RawManifest(descriptor, raw), copied[1])
        assert list(signature_manifests(repository, snapshot.digest)) == []
        assert all(found.signature is None for found in find_signatures(repository, target))
