"""A snapshot to be signed, and signers' keys, made once."""

from pathlib import Path

import pytest

from tests.support.memory_repository import MemoryRepository
from tests.support.signing import Chain, Key, Signatures, chain
from tests.support.snapshots import BuiltSnapshot, build_snapshot, random_device


@pytest.fixture(scope="session")
def snapshot() -> BuiltSnapshot:
    return build_snapshot(random_device(16), extents=1, packs=1)


@pytest.fixture
def repository(snapshot: BuiltSnapshot) -> MemoryRepository:
    return MemoryRepository(snapshot)


@pytest.fixture
def signatures(repository: MemoryRepository) -> Signatures:
    return Signatures(repository)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="session")
def key(keys: Path) -> Key:
    return Key.make(keys / "ours")


@pytest.fixture(scope="session")
def other_key(keys: Path) -> Key:
    return Key.make(keys / "other")


@pytest.fixture(scope="session")
def signer(keys: Path) -> Chain:
    return chain(keys / "signer")
