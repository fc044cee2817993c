"""Places for the command line tests; each test gives back all it took."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry, running_registry
from tests.support.image_builder import collect, image
from tests.support.installed import HTTP
from tests.support.samples import program_tar
from tests.support.tars import Item, layer_tar

GRACE_S = 10.0
"""For processes that end by themselves, when what they served has gone."""


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    """One for all tests that neither stop nor damage it: each uses names of its own."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def own_registry(tmp_path: Path) -> Iterator[DockerRegistry]:
    """One for a test that stops it or damages what it stores."""
    with running_registry(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository name that no other test uses."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield from _clean_cli(tmp_path / "cli")


@pytest.fixture
def other_cli(tmp_path: Path) -> Iterator[Cli]:
    """Another node's."""
    yield from _clean_cli(tmp_path / "other")


def _clean_cli(root: Path) -> Iterator[Cli]:
    command = Cli(root)
    yield command
    deadline = time.monotonic() + GRACE_S
    while (left := command.leftovers()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        command.any("umount", "--all", "--lazy")
        for pid in command.processes():
            os.kill(pid, signal.SIGKILL)
    assert left == []


@pytest.fixture
def fast(cli: Cli, own_registry: DockerRegistry, name: str) -> str:
    """A converted image, of a program and /app."""
    app = layer_tar([Item(b"app", content=b"the app\n")])
    found = own_registry.put(name, collect(image(program_tar(), app), "1.0"))
    cli.convert(found, f"{found}-fast", HTTP, "--as", "image")
    return f"{found}-fast"
