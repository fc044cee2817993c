"""version, completion and doctor; logging and tracebacks on request."""

import subprocess

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.samples import base_tar

HTTP = "--plain-http"


def test_version(cli: Cli):
    value = cli("version", "--format", "json").json
    assert value["format"] == 1 and set(value["packages"]) >= {"blake3", "zstandard"}
    assert value["version"] in cli("version").out
    assert cli("--version").out == f"imgsnap {value['version']}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(cli: Cli, shell: str):
    script = cli("completion", shell).out
    assert "_IMGSNAP_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.root
@pytest.mark.registry
def test_doctor(cli: Cli, registry: DockerRegistry, name: str):
    value = cli("doctor", "--format", "json").json
    assert value["ok"] and {check["status"] for check in value["checks"]} <= {"ok", "warn"}
    assert all(check["name"] and check["detail"] for check in value["checks"])
    remote = registry.put(name, collect(image(base_tar(1000))))
    assert "serves ranges" in cli("doctor", HTTP, remote).out
    absent = cli.any("doctor", HTTP, f"{remote}-absent", "--format", "json")
    assert absent.code in (0, 4, 8) and "Traceback" not in absent.err


def test_debug_shows_where_an_error_comes_from(cli: Cli):
    result = cli.any("--debug", "inspect", "store:absent")
    assert result.code == 1 and "Traceback" in result.err and "NotFound" in result.err
