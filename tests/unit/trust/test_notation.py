"""Notary Project signatures, made by openssl: chains, algorithms, times and what is signed."""

import json
import time
from base64 import b64decode
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imgsnap.errors import FormatError, InvalidArgument
from imgsnap.trust import certificates
from imgsnap.trust.judge import Judge, Verdict
from imgsnap.trust.names import Name
from imgsnap.trust.notation import NotationSignature, parse_jws
from imgsnap.trust.policy import NotationSigned
from imgsnap.trust.subjects import parse_subject
from imgsnap.trust.target import NotAccepted, Target
from tests.support.signing import AUTHORITY, LEAF, Chain, Jws, certificate, chain
from tests.support.snapshots import build_snapshot, random_device

US = "x509.subject: C=US, ST=WA, O=Example"


@pytest.fixture
def judged(snapshot, repository, signer):
    def judge(*subjects: str, roots=(signer.root,)) -> Verdict:
        name = Name.of(repository.name, "latest")
        requirement = NotationSigned(tuple(roots), tuple(map(parse_subject, subjects)))
        return Judge(repository, name, [Target.of(snapshot.manifest)]).judge((requirement,))

    return judge


def parsed(value: dict) -> NotationSignature:
    return parse_jws(json.dumps(value).encode())


@pytest.mark.parametrize("kind", ["ec", "ec384", "ec521", "rsa", "rsa3072"])
def test_every_algorithm(kind, tmp_path, snapshot, signatures, judged):
    own = chain(tmp_path, kind)
    signatures.notation(snapshot.digest, Jws.of(snapshot.manifest).signed(own))
    verdict = judged(US, roots=(own.root,))
    assert verdict.accepted, verdict.reason
    assert verdict.signers[0].name == "certificate CN=signer,O=Example,ST=WA,C=US"
    assert verdict.until == datetime(2099, 1, 1, tzinfo=UTC).timestamp()


def test_another_root(tmp_path, snapshot, signatures, signer, judged):
    other = chain(tmp_path)
    signatures.notation(snapshot.digest, Jws.of(snapshot.manifest).signed(signer))
    verdict = judged(roots=(other.root,))
    assert not verdict.accepted and "not among the trusted roots" in verdict.reason
    assert judged(roots=(other.root + signer.root,)).accepted


def test_whose_certificate_it_is(snapshot, signatures, signer, judged):
    signatures.notation(snapshot.digest, Jws.of(snapshot.manifest).signed(signer))
    assert judged().accepted
    assert judged(US + ", CN=signer").accepted
    assert judged("x509.subject: C=US, ST=WA, O=Other", US).accepted
    for refused in (US + ", CN=other", US + ", OU=signer", "x509.subject: C=US, ST=OR, O=Example"):
        verdict = judged(refused)
        assert not verdict.accepted and "no trusted identity" in verdict.reason


def test_a_signature_of_another_manifest(snapshot, signatures, signer, judged):
    other = build_snapshot(random_device(9), extents=1, packs=1).manifest
    signatures.notation(snapshot.digest, Jws.of(other).signed(signer))
    verdict = judged()
    assert not verdict.accepted and other.descriptor.digest in verdict.reason


@pytest.mark.parametrize("field", ["mediaType", "digest", "size"])
def test_all_of_the_descriptor_counts(field, snapshot, signatures, signer, judged):
    good = Jws.of(snapshot.manifest)
    artifact = json.loads(good.payload)["targetArtifact"]
    artifact[field] = {
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "digest": "sha256:" + "0" * 64,
        "size": artifact["size"] + 1,
    }[field]
    changed = Jws(json.dumps({"targetArtifact": artifact}).encode(), good.protected)
    signatures.notation(snapshot.digest, changed.signed(signer))
    assert not judged().accepted


def test_what_was_changed_after_signing(snapshot, signatures, signer, judged):
    value = Jws.of(snapshot.manifest).signed(signer)
    other = Jws.of(snapshot.manifest, expiry="2090-01-01T00:00:00Z").signed(signer)
    for name in ("payload", "protected", "signature"):
        swapped = Jws(b'{"targetArtifact":{}}').signed(signer) if name == "payload" else other
        signatures.repository.subjects.clear()
        signatures.notation(snapshot.digest, value | {name: swapped[name]})
        assert not judged().accepted, name


def test_expiry(snapshot, signatures, signer, judged):
    signatures.notation(
        snapshot.digest, Jws.of(snapshot.manifest, expiry="2026-01-03T00:00:00Z").signed(signer)
    )
    verdict = judged()
    assert not verdict.accepted and "expired" in verdict.reason
    signatures.notation(
        snapshot.digest,
        Jws.of(snapshot.manifest, expiry="2090-01-03T00:00:00.5+01:00").signed(signer),
    )
    accepted = judged()
    assert accepted.accepted
    assert accepted.until == datetime(2090, 1, 2, 23, 0, 0, 500000, UTC).timestamp()


def test_the_moment_of_expiry(snapshot, signer):
    target = Target.of(snapshot.manifest)
    signature = parsed(Jws.of(snapshot.manifest, expiry="2090-01-01T00:00:00Z").signed(signer))
    requirement = NotationSigned((signer.root,), ())
    end = datetime(2090, 1, 1, tzinfo=UTC).timestamp()
    assert signature.accept(requirement, target, lambda: end - 1).until == end
    with pytest.raises(NotAccepted, match="expired"):
        signature.accept(requirement, target, lambda: end)


# Certificates ----------------------------------------------------------------------------------


def leaf(directory: Path, **how) -> Chain:
    """A signer whose own certificate is unusual."""
    return chain(directory, **how)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"dates": ("20200101000000Z", "20260101000000Z")}, "has expired when it was signed"),
        ({"dates": ("20200101000000Z", "20260601000000Z")}, "has expired now"),
        ({"dates": ("20260301000000Z", "20990101000000Z")}, "not yet valid when it was signed"),
        ({"extensions": ("basicConstraints=CA:false",)}, "no key usage"),
        ({"extensions": ("keyUsage=digitalSignature",)}, "not critical"),
        ({"extensions": ("keyUsage=critical,nonRepudiation",)}, "digitalSignature alone"),
        (
            {"extensions": ("keyUsage=critical,digitalSignature,keyCertSign",)},
            "digitalSignature alone",
        ),
        ({"extensions": (*LEAF[:1], "extendedKeyUsage=timeStamping")}, "other uses"),
        ({"extensions": (*LEAF[:1], "extendedKeyUsage=codeSigning,serverAuth")}, "other uses"),
        ({"extensions": (*LEAF, "basicConstraints=CA:true")}, "certificate authority"),
    ],
)
def test_signers_that_may_not_sign(how, why, tmp_path, snapshot, signatures, judged):
    own = leaf(tmp_path, **how)
    signatures.notation(snapshot.digest, Jws.of(snapshot.manifest).signed(own))
    verdict = judged(roots=(own.root,))
    assert not verdict.accepted and why in verdict.reason


@pytest.mark.parametrize(
    ("extensions", "why"),
    [
        ((*AUTHORITY[1:],), "no basic constraints"),
        (("basicConstraints=CA:true", *AUTHORITY[1:]), "may not issue"),
        (("basicConstraints=critical,CA:false", *AUTHORITY[1:]), "may not issue"),
        ((AUTHORITY[0], "keyUsage=critical,cRLSign"), "may not issue"),
        (("basicConstraints=critical,CA:true,pathlen:0", *AUTHORITY[1:]), "so many authorities"),
    ],
)
def test_authorities_that_may_not_issue(extensions, why, tmp_path, snapshot):
    """Between the signer and the root."""
    root = certificate(tmp_path, "root", subject="/O=Root", extensions=AUTHORITY)
    if "pathlen" in extensions[0]:
        root = certificate(tmp_path, "short", subject="/O=Root", extensions=extensions)
        extensions = AUTHORITY
    middle = certificate(tmp_path, "middle", issuer=root, subject="/O=Mid", extensions=extensions)
    key, own = certificate(tmp_path, "leaf", issuer=middle)
    made = Chain(key, (own, middle[1], root[1]))
    signature = parsed(Jws.of(snapshot.manifest).signed(made))
    requirement = NotationSigned((made.root,), ())
    with pytest.raises(NotAccepted, match=why):
        signature.accept(requirement, Target.of(snapshot.manifest))


def test_a_longer_chain_and_a_pinned_authority(tmp_path, snapshot):
    root = certificate(tmp_path, "root", subject="/O=Root", extensions=AUTHORITY)
    middle = certificate(tmp_path, "middle", issuer=root, subject="/O=Mid", extensions=AUTHORITY)
    key, own = certificate(tmp_path, "leaf", issuer=middle)
    target = Target.of(snapshot.manifest)
    whole = parsed(Jws.of(snapshot.manifest).signed(Chain(key, (own, middle[1], root[1]))))
    for trusted in (root[1], middle[1], own):
        assert whole.accept(NotationSigned((trusted,), ()), target)
    for certificates_ in ((own, root[1], middle[1]), (own, root[1]), (own, middle[1]), (own,)):
        broken = parsed(Jws.of(snapshot.manifest).signed(Chain(key, certificates_)))
        with pytest.raises(NotAccepted, match="not issued by"):
            broken.accept(NotationSigned((root[1], middle[1], own), ()), target)


def test_a_signer_of_its_own(tmp_path, snapshot):
    key, own = certificate(tmp_path, "self")
    signature = parsed(Jws.of(snapshot.manifest).signed(Chain(key, (own,))))
    assert signature.accept(NotationSigned((own,), ()), Target.of(snapshot.manifest))


def test_sha1_is_refused(tmp_path, snapshot, signer):
    root = certificate(tmp_path, "root", extensions=AUTHORITY, digest="sha1", subject="/O=Root")
    key, own = certificate(tmp_path, "leaf", issuer=root)
    signature = parsed(Jws.of(snapshot.manifest).signed(Chain(key, (own, root[1]))))
    with pytest.raises(NotAccepted, match="SHA-2"):
        signature.accept(NotationSigned((root[1],), ()), Target.of(snapshot.manifest))


def test_the_key_decides_the_algorithm(tmp_path, snapshot, signer):
    """Else a signer of RSA's could be made to verify as something weaker."""
    target = Target.of(snapshot.manifest)
    for said in ("none", "HS256", "ES384", "PS256", ""):
        signature = parsed(Jws.of(snapshot.manifest, alg=said).signed(signer))
        with pytest.raises(NotAccepted, match="algorithm"):
            signature.accept(NotationSigned((signer.root,), ()), target)


def test_roots_that_are_none():
    for text in (b"", b"nonsense"):
        with pytest.raises(InvalidArgument):
            certificates.parse_roots(text)


# Envelopes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cty": "application/json"}, "cty"),
        ({"crit": []}, "crit"),
        ({"crit": ["io.cncf.notary.signingScheme"] * 2}, "crit"),
        ({"crit": ["io.cncf.notary.signingScheme", "io.cncf.notary.expiry"]}, "crit"),
        ({"io.cncf.notary.expiry": "2090-01-01T00:00:00Z"}, "crit"),
        ({"io.cncf.notary.signingTime": "yesterday"}, "RFC 3339"),
        ({"io.cncf.notary.signingTime": "2026-13-02T03:04:05Z"}, "no time"),
        ({"io.cncf.notary.signingTime": 7}, "RFC 3339"),
    ],
)
def test_headers_that_break_the_format(changes, problem, snapshot, signer):
    with pytest.raises(FormatError, match=problem):
        parsed(Jws.of(snapshot.manifest, **changes).signed(signer))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"io.cncf.notary.signingScheme": "notary.x509.signingAuthority"}, "signing scheme"),
        ({"io.cncf.notary.verificationPlugin": "some.plugin"}, "plugin"),
        ({"new": 1, "crit": ["io.cncf.notary.signingScheme", "new"]}, "critical header 'new'"),
    ],
)
def test_headers_that_ask_for_what_we_cannot(changes, problem, snapshot, signer):
    with pytest.raises(NotAccepted, match=problem):
        parsed(Jws.of(snapshot.manifest, **changes).signed(signer))


def test_envelopes_that_break_the_format(snapshot, signer):
    good = Jws.of(snapshot.manifest).signed(signer)
    for changed in (
        {"header": {"x5c": []}},
        {"header": {"x5c": ["not base64"]}},
        {"header": {"x5c": good["header"]["x5c"] * 9}},
        {"header": []},
        {"payload": good["payload"] + "="},
        {"payload": 7},
        {"signature": "!"},
        {"signatures": []},
    ):
        with pytest.raises(FormatError):
            parsed(good | changed)
    with pytest.raises(FormatError):
        parsed({name: good[name] for name in ("payload", "protected", "signature")})


def test_only_the_envelope_that_we_know(snapshot, signatures, signer, judged):
    value = Jws.of(snapshot.manifest).signed(signer)
    signatures.notation(snapshot.digest, value, "application/cose")
    verdict = judged()
    assert not verdict.accepted and "COSE" in verdict.reason


def test_a_clock_that_is_far_off(snapshot, signer):
    target = Target.of(snapshot.manifest)
    signature = parsed(Jws.of(snapshot.manifest).signed(signer))
    requirement = NotationSigned((signer.root,), ())
    assert signature.accept(requirement, target, time.time)
    with pytest.raises(NotAccepted, match="not yet valid now"):
        signature.accept(requirement, target, lambda: 0.0)


def test_certificates_that_the_parser_only_warns_of(recwarn):
    """A registry shall not print on a terminal either."""
    golden = Path(__file__).parents[2] / "golden/signatures/notation.jws.json"
    der = b64decode(json.loads(golden.read_bytes())["header"]["x5c"][0])
    certificates.parse_chain([der])
    negative = der.replace(b"\x02\x02\x00\x82", b"\x02\x02\x80\x82", 1)  # the serial number
    country = der.replace(b"\x55\x04\x0a", b"\x55\x04\x06", 1)  # as long as an organisation
    for changed in (negative, country):
        assert changed != der
        with pytest.raises(FormatError, match="no certificate"):
            certificates.parse_chain([changed])
    assert not recwarn.list
