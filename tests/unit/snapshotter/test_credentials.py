"""Credentials that come with pulls: what is kept, for whom, and what is refused."""

import base64
import json
import stat
from pathlib import Path

import pytest

from imgsnap.errors import InvalidArgument, InvalidReference
from imgsnap.oci.credentials import Credentials, CredentialSource
from imgsnap.oci.reference import RegistryLocation
from imgsnap.snapshotter.credentials import FILE_BYTES_MAX, PodCredentials, parse_auth

GOOD = Credentials("user", "pass:word")


class Registry:
    """Accepts one credential, and sees what it is asked with."""

    def __init__(self, accepted: Credentials = GOOD) -> None:
        self.accepted = accepted
        self.asked: list[str] = []

    def __call__(self, location: RegistryLocation, file: Path) -> bool:
        self.asked.append(str(location))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        return found(file, str(location.registry), location.repository) == self.accepted


def found(file: Path, registry: str, repository: str) -> Credentials | None:
    return CredentialSource({}, first=file).lookup(registry, repository)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "pod-credentials.json"


def test_kept_for_the_repository_alone(path: Path):
    kept = PodCredentials(path, Registry())
    assert kept.offer("r.example/team/app:1", GOOD)
    assert found(path, "r.example", "team/app") == GOOD
    assert found(path, "r.example", "team/app/sub") == GOOD  # as docker's format has it
    assert found(path, "r.example", "team/other") is None
    assert found(path, "r.example:5000", "team/app") is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("image", ["busybox", "library/busybox", "docker.io/library/busybox:1"])
def test_short_names_are_docker_hubs(path: Path, image: str):
    kept = PodCredentials(path, Registry())
    assert kept.offer(image, GOOD)
    assert found(path, "docker.io", "library/busybox") == GOOD


def test_the_registry_is_asked_once(path: Path):
    registry = Registry()
    kept = PodCredentials(path, registry)
    for _ in range(3):
        assert kept.offer("r.example/app:1", GOOD)
    assert registry.asked == ["r.example/app:1"]


def test_what_the_registry_refuses_replaces_nothing(path: Path):
    registry = Registry()
    kept = PodCredentials(path, registry)
    assert not kept.offer("r.example/app", Credentials("user", "wrong"))
    assert not path.exists()
    kept.offer("r.example/app", GOOD)
    assert not kept.offer("r.example/app", Credentials("user", "wrong"))
    assert found(path, "r.example", "app") == GOOD
    registry.accepted = Credentials(identity_token="new")
    assert kept.offer("r.example/app", registry.accepted)
    assert found(path, "r.example", "app") == registry.accepted


def test_the_oldest_go_first(path: Path):
    secret = Credentials("user", "x" * 30_000)
    kept = PodCredentials(path, Registry(secret))
    for number in range(40):
        assert kept.offer(f"r.example/app-{number}", secret)
    assert path.stat().st_size <= FILE_BYTES_MAX + 100
    names = list(json.loads(path.read_text())["auths"])
    assert 10 < len(names) < 40
    assert names == [f"r.example/app-{number}" for number in range(40 - len(names), 40)]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"auths": 3}'])
def test_a_damaged_file_is_begun_anew(path: Path, text: str):
    path.parent.mkdir()
    path.write_text(text)
    assert PodCredentials(path, Registry()).offer("r.example/app", GOOD)
    assert found(path, "r.example", "app") == GOOD


@pytest.mark.parametrize(
    "image", ["", "UPPER", "/etc/passwd", "r.example/../x", "store:x:1:2", "x" * 5000]
)
def test_what_is_no_image_of_a_registry(path: Path, image: str):
    with pytest.raises(InvalidArgument):
        PodCredentials(path, Registry()).offer(image, GOOD)
    assert not path.exists()


def test_too_large(path: Path):
    with pytest.raises(InvalidArgument, match="at most"):
        PodCredentials(path, Registry()).offer("r.example/app", Credentials("u", "p" * 40_000))


def packed(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"username": "u", "password": "p"}, Credentials("u", "p")),
        ({"auth": packed("u:p:q")}, Credentials("u", "p:q")),
        ({"auth": packed("u:p\0\0")}, Credentials("u", "p")),
        ({"identity_token": "t", "auth": packed("u:p")}, Credentials(identity_token="t")),
        ({"username": "u", "server_address": "r.example"}, Credentials("u")),
        ({"username": "u", "server_address": "https://r.example/v1/"}, Credentials("u")),
        ({"username": "u", "server_address": "other.example"}, None),
        ({"username": "u", "server_address": "r.example:444"}, None),
    ],
)
def test_fields_mean_what_they_mean_to_containerd(fields: dict, expected: Credentials | None):
    assert parse_auth("r.example/app:1", **fields) == expected


@pytest.mark.parametrize(
    "fields",
    [{"auth": "!"}, {"auth": packed("nocolon")}, {"username": "u", "server_address": "http://["}],
)
def test_fields_that_make_no_sense(fields: dict):
    with pytest.raises(InvalidArgument):
        parse_auth("r.example/app:1", **fields)


def test_a_bad_name_with_a_server():
    with pytest.raises(InvalidReference):
        parse_auth("BAD NAME", username="u", server_address="r.example")


def test_other_files_are_asked_afterwards(tmp_path: Path, path: Path):
    config = tmp_path / "config.json"
    entry = {"username": "node", "password": "n"}
    config.write_text(json.dumps({"auths": {"r.example": entry}}))
    source = CredentialSource({}, config, first=path)
    assert source.lookup("r.example", "app") == Credentials("node", "n")
    PodCredentials(path, Registry()).offer("r.example/app", GOOD)
    assert source.lookup("r.example", "app") == GOOD
    assert source.lookup("r.example", "other") == Credentials("node", "n")
