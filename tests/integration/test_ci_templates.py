"""The pipelines' own script lines, run as a runner would, against a real registry."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.cli import REPOSITORY, Cli
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, running_registry
from tests.support.image_builder import collect, image
from tests.support.samples import program_tar

pytestmark = [pytest.mark.registry]
CI = REPOSITORY / "deploy/ci"


@pytest.fixture
def runner(cli: Cli, tmp_path: Path) -> dict[str, str]:
    """An environment with `imgsnap` on the path, and nothing of ours in it."""
    program = tmp_path / "bin/imgsnap"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m imgsnap_cli "$@"\n')
    program.chmod(0o755)
    return {**cli.environment(), "PATH": f"{program.parent}:{os.environ['PATH']}"}


@pytest.fixture
def private(tmp_path: Path):
    """A registry that wants a password, with an image."""
    with running_registry(tmp_path / "registry") as registry:
        registry.put("team/app", collect(image(program_tar()), "1.0"))
        registry.stop()
        registry.auth = True
        registry.start()
        yield registry


def run(script: str, directory: Path, environ: dict[str, str], shell: str = "bash") -> str:
    command = [shell, "-e", "-c", script]
    done = subprocess.run(
        command, cwd=directory, env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_gitlab(cli: Cli, runner: dict[str, str], private: DockerRegistry, tmp_path: Path):
    job = yaml.safe_load((CI / "gitlab/imgsnap.gitlab-ci.yml").read_text())[".imgsnap-convert"]
    login = {"CI_REGISTRY_USER": USER, "CI_REGISTRY_PASSWORD": PASSWORD}
    reference = f"{private.address}/team/app:1.0"
    variables = {**job["variables"], "IMGSNAP_SOURCE": reference}
    environ = {**runner, **login, "CI_REGISTRY": private.address, **variables}
    out = run("\n".join(job["script"]), tmp_path, environ, shell="sh")
    assert f"{reference}-snapshot" in out.splitlines()[-1]
    assert list(cli.tmp.iterdir()) == []  # no password is left


def test_github(cli: Cli, runner: dict[str, str], private: DockerRegistry, tmp_path: Path):
    action = yaml.safe_load((CI / "github/action.yml").read_text())
    install, convert = action["runs"]["steps"]
    source = install["env"]["SOURCE"].replace("${{ github.action_path }}", str(CI / "github"))
    assert Path(source).resolve() == REPOSITORY and (Path(source) / "pyproject.toml").exists()
    reference = f"{private.address}/team/app:1.0"
    written = {"IMAGE": "image", "TARGET": "target", "OPTIONS": "options"}
    assert convert["env"] == {key: f"${{{{ inputs.{name} }}}}" for key, name in written.items()}
    inputs = {name: value.get("default", reference) for name, value in action["inputs"].items()}
    values = {key: inputs[name] for key, name in written.items()}
    config = Path(runner["HOME"]) / ".docker/config.json"  # as docker/login-action leaves it
    config.parent.mkdir()
    login = {"username": USER, "password": PASSWORD}
    config.write_text(json.dumps({"auths": {private.address: login}}))
    output = tmp_path / "output"
    run(convert["run"], tmp_path, {**runner, **values, "GITHUB_OUTPUT": str(output)})
    name, _, value = output.read_text().strip().partition("=")
    assert name == "snapshot" and value.startswith(f"{reference}-snapshot@sha256:")
    assert "steps.convert.outputs.snapshot" in action["outputs"]["snapshot"]["value"]
    assert convert["id"] == "convert"
