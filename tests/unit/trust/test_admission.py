"""The check at a snapshot's opening: before its parts, once per name, policy and digest."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.store import BlockStore
from imgsnap.errors import DigestMismatch, InvalidArgument, NotTrusted, Unavailable, Unsupported
from imgsnap.trust import keys
from imgsnap.trust.admission import Admission
from imgsnap.trust.identity import Match, SignedIdentity
from imgsnap.trust.judge import check_keys
from imgsnap.trust.policy import (
    AcceptAnything,
    NotationSigned,
    Policy,
    Reject,
    Requirement,
    SigstoreSigned,
)
from tests.support.memory_repository import MemoryRepository
from tests.support.signing import Jws, Key, simple_payload
from tests.support.snapshots import build_snapshot, index_manifest, random_device


@pytest.fixture
def cache(tmp_path) -> NodeCache:
    return NodeCache(tmp_path / "cache")


def by(*keys: Key, match: Match = Match.REPOSITORY) -> SigstoreSigned:
    return SigstoreSigned(tuple(key.public for key in keys), SignedIdentity(match))


def admission(cache: NodeCache, *requirements: Requirement) -> Admission:
    return Admission.of_texts([Policy(requirements, {}).to_text()], cache)


def opened(store: BlockStore, repository: MemoryRepository, admit: Admission, tag="latest") -> int:
    device = store.open(repository, tag, admit=admit)
    size = device.reader.size
    device.close()
    return size


def test_nothing_is_fetched_of_what_is_not_accepted(cache, snapshot, repository, signatures, key):
    admit = admission(cache, by(key))
    with BlockStore(cache) as store:
        with pytest.raises(NotTrusted, match="no signature"):
            opened(store, repository, admit)
        assert repository.count("blob") == repository.count("open") == 0
        assert not repository.ranges
        signatures.cosign(snapshot.digest, key)
        assert opened(store, repository, admit) == len(snapshot.device)


def test_it_is_remembered_for_the_policy_the_name_and_the_digest(
    cache, snapshot, repository, signatures, key, other_key
):
    signatures.cosign(snapshot.digest, key)
    documents = (snapshot.manifest,)
    admission(cache, by(key))(repository, "latest", documents)
    repository.faults.away = 1
    admission(cache, by(key))(repository, "latest", documents)
    with pytest.raises(Unavailable):
        admission(cache, by(key))(repository, "other", documents)
    with pytest.raises(Unavailable):
        admission(cache, by(key))(repository, snapshot.digest, documents)
    with pytest.raises(Unavailable):
        admission(cache, by(key, other_key))(repository, "latest", documents)
    with pytest.raises(Unavailable):
        admission(cache, by(key, match=Match.DIGEST_ONLY))(repository, "latest", documents)
    elsewhere = MemoryRepository(snapshot, name="registry.test/other")
    with pytest.raises(NotTrusted):
        admission(cache, by(key))(elsewhere, "latest", documents)
    other = build_snapshot(random_device(9), extents=1, packs=1)
    with pytest.raises(Unavailable):
        admission(cache, by(key))(repository, "latest", (other.manifest,))


def test_a_refusal_is_not_remembered(cache, snapshot, repository, signatures, key):
    admit = admission(cache, by(key))
    with pytest.raises(NotTrusted):
        admit(repository, "latest", (snapshot.manifest,))
    signatures.cosign(snapshot.digest, key)
    admit(repository, "latest", (snapshot.manifest,))


def test_what_expires_is_asked_for_again(
    cache, snapshot, repository, signatures, signer, monkeypatch
):
    jws = Jws.of(snapshot.manifest, expiry="2090-01-01T00:00:00Z")
    signatures.notation(snapshot.digest, jws.signed(signer))
    admit = admission(cache, NotationSigned((signer.root,), ()))
    admit(repository, "latest", (snapshot.manifest,))
    repository.faults.away = 1
    admit(repository, "latest", (snapshot.manifest,))
    monkeypatch.setattr("imgsnap.trust.admission.time.time", lambda: 3786912000.0)  # 2090-01-01
    with pytest.raises(Unavailable):
        admit(repository, "latest", (snapshot.manifest,))


@pytest.mark.parametrize("kept", [b"", b"{", b"[]", b'{"until": "soon"}', b'{"until": []}'])
def test_a_damaged_memory_is_none(kept, cache, snapshot, repository, signatures, key, monkeypatch):
    signatures.cosign(snapshot.digest, key)
    admit = admission(cache, by(key))
    monkeypatch.setattr(cache, "load_tag", lambda name: kept)
    before = repository.count("manifest")
    admit(repository, "latest", (snapshot.manifest,))
    assert repository.count("manifest") > before


def test_every_policy_and_every_requirement(
    cache, snapshot, repository, signatures, key, other_key, signer
):
    signatures.cosign(snapshot.digest, key)
    documents = (snapshot.manifest,)
    both = admission(cache, by(key), by(other_key))
    with pytest.raises(NotTrusted, match="another key"):
        both(repository, "latest", documents)
    texts = [Policy((found,), {}).to_text() for found in (AcceptAnything(), by(key), Reject())]
    Admission.of_texts(texts[:2], cache)(repository, "latest", documents)
    with pytest.raises(NotTrusted, match="rejects"):
        Admission.of_texts(texts, cache)(repository, "latest", documents)
    signatures.cosign(snapshot.digest, other_key)
    both(repository, "latest", documents)


def test_accepting_anything_asks_nobody(cache, snapshot, repository):
    repository.faults.away = 1
    admission(cache, AcceptAnything())(repository, "latest", (snapshot.manifest,))
    assert repository.log == []


def test_a_signed_index_vouches_for_its_snapshots(cache, snapshot, repository, signatures, key):
    index = index_manifest([(snapshot.manifest.descriptor, "amd64")])
    repository.add_manifest(index, "many")
    payload = simple_payload(index.descriptor.digest)
    signatures.cosign(index.descriptor.digest, key, payload)
    with BlockStore(cache) as store:
        opened(store, repository, admission(cache, by(key)), "many")
        with pytest.raises(NotTrusted):
            opened(store, repository, admission(cache, by(key)))


def test_bytes_that_are_not_the_digests_are_not_judged(
    cache, snapshot, repository, signatures, key
):
    """A local store does not hash what it reads."""
    signatures.cosign(snapshot.digest, key)
    lying = replace(snapshot.manifest, raw=snapshot.manifest.raw + b" ")
    with pytest.raises(DigestMismatch):
        admission(cache, by(key))(repository, "latest", (lying,))


def test_texts_that_are_no_policy(cache):
    for text in ("", "{}", json.dumps({"default": [{"type": "x"}]})):
        with pytest.raises(InvalidArgument):
            Admission.of_texts([text], cache)


def test_without_the_package_it_says_what_to_install(
    cache, snapshot, repository, signatures, key, monkeypatch
):
    signatures.cosign(snapshot.digest, key)
    policy = Policy((by(key),), {})
    monkeypatch.setitem(sys.modules, "cryptography", None)
    keys.public_key.cache_clear()
    with pytest.raises(Unsupported, match="not installed") as raised:
        admission(cache, by(key))(repository, "latest", (snapshot.manifest,))
    assert "imgsnap[trust]" in (raised.value.hint or "")
    with pytest.raises(Unsupported):
        check_keys(policy)
    admission(cache, AcceptAnything())(repository, "latest", (snapshot.manifest,))


def test_keys_are_checked_before_a_daemon_relies_on_them(key, signer):
    check_keys(Policy((by(key), NotationSigned((signer.root,), ())), {}))
    for wrong in (SigstoreSigned((b"x",), SignedIdentity()), NotationSigned((b"x",), ())):
        with pytest.raises(InvalidArgument):
            check_keys(Policy((Reject(),), {"docker": {"a.test": (wrong,)}}))


def test_without_a_policy_nothing_of_this_is_imported():
    modules = "imgsnap_cli.cmd_mount, imgsnap.node.client, imgsnap.node.block_server"
    more = "imgsnap.node.session, imgsnap.node.direct_mount, imgsnap.node.daemon"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}, {more}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout.split()
    assert "imgsnap.node.block_server" in found
    assert [name for name in found if name.startswith(("imgsnap.trust", "cryptography"))] == []
