"""A repository's name, with and without opening it."""

from pathlib import Path

import pytest

from imgsnap.oci.locate import RegistryOptions, open_repository, repository_name
from imgsnap.oci.reference import parse_location


@pytest.mark.parametrize(
    "text", ["registry.example:5000/team/app:v1", "docker.io/library/busybox", "store:app:v1"]
)
def test_the_name_is_that_of_the_opened_repository(tmp_path: Path, text: str) -> None:
    location, store = parse_location(text), tmp_path / "store"
    repository, _ = open_repository(
        location, RegistryOptions(), store=store, environ={}, create=True
    )
    assert repository_name(location, store) == repository.name
    repository.close()


def test_the_name_of_a_layout(tmp_path: Path) -> None:
    location = parse_location(f"oci:{tmp_path}/layout:v1")
    repository, _ = open_repository(
        location, RegistryOptions(), store=tmp_path, environ={}, create=True
    )
    assert repository_name(location, tmp_path) == repository.name
    repository.close()


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_the_name_of_an_archive(kind: str) -> None:
    assert repository_name(parse_location(f"{kind}:/a.tar:b"), Path("/s")) == f"{kind}:/a.tar"
