"""What is in deploy/: it parses, and every imgsnap command line in it is one that exists."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from imgsnap import __version__
from imgsnap_cli.main import cli

DEPLOY = Path(__file__).parents[3] / "deploy"
CHART = DEPLOY / "helm/imgsnap"
UNITS = sorted((DEPLOY / "systemd").iterdir())
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
PIPELINES = sorted((DEPLOY / "ci").rglob("*.yml"))


def check_command(words: list[str]) -> None:
    """Parses a command line as the command itself would, without running anything."""
    context = cli.make_context("imgsnap", list(words))
    command: click.Command = cli
    while isinstance(command, click.Group):
        rest = [*context._protected_args, *context.args]
        name, found, rest = command.resolve_command(context, rest)
        assert name is not None and found is not None, words
        context = found.make_context(name, rest, parent=context)
        command = found


def documents(path: Path) -> list[Any]:
    return [found for found in yaml.safe_load_all(path.read_text()) if found]


def unit(path: Path) -> dict[str, list[str]]:
    """Keys to values; sections do not share any here."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_commands_that_exist(path: Path):
    for line in unit(path).get("ExecStart", []):
        program, *words = shlex.split(line)
        assert program == "/usr/bin/imgsnap"
        check_command(words)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_understands_the_units(path: Path, tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    program = tmp_path / "usr/bin/imgsnap"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for other in UNITS:  # they name each other
        text = other.read_text().replace("/usr/bin/imgsnap", str(program))
        (tmp_path / other.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(tmp_path / path.name)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    newer = "Unknown key 'FileDescriptorStorePreserve'"  # systemd 254; ignored by older ones
    lines = [line for line in done.stderr.splitlines() if newer not in line]
    assert lines == [] and (done.returncode == 0 or newer in done.stderr), done.stderr


def test_the_snapshotters_mounts_are_the_hosts():
    """Any of these would give the unit a mount namespace of its own: systemd.exec(5)."""
    found = unit(DEPLOY / "systemd/imgsnap-snapshotter.service")
    assert found["KillMode"] == ["process"] and found["Type"] == ["notify"]
    private = re.compile(r"Private|Protect|Root(Directory|Image)|Bind|Read\w+Paths|Mount|Inaccess")
    assert not [key for key in found if private.match(key)]


@pytest.mark.parametrize("path", [*MANIFESTS, *PIPELINES], ids=lambda path: path.name)
def test_yaml(path: Path):
    assert all(isinstance(found, dict) for found in documents(path)) and documents(path)


def rendered(*settings: str) -> list[Any]:
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("there is no helm")
    command = [helm, "template", "imgsnap", str(CHART), "--namespace", "kube-system", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def check_workloads(found: list[Any]) -> None:
    """Containers start commands that exist, see the node's mounts, and mount what they declare."""
    sets = [item for item in found if item["kind"] == "DaemonSet"]
    assert {item["metadata"]["name"] for item in sets} == {"imgsnap-blocks", "imgsnap-snapshotter"}
    for item in sets:
        template = item["spec"]["template"]
        wanted = item["spec"]["selector"]["matchLabels"].items()
        assert wanted <= template["metadata"]["labels"].items()
        assert template["spec"]["hostPID"] is True
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            check_command(container["args"])
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert set(mounts) == volumes
            for name in ("run", "state"):
                assert mounts[name]["mountPropagation"] == "Bidirectional"
            assert container["securityContext"] == {"privileged": True}


def test_the_plain_manifest():
    check_workloads(documents(DEPLOY / "kubernetes/imgsnap.yaml"))


def test_the_plain_manifest_is_the_chart_with_its_defaults():
    """Made by: helm template imgsnap deploy/helm/imgsnap -n kube-system"""
    assert rendered() == documents(DEPLOY / "kubernetes/imgsnap.yaml")


ALL = {
    "imageService": "true",
    "runtimeClass": "true",
    "registrySecret": "node-registry",
    "cacheQuota": "20GiB",
    "metricsPort": "0",
    "snapshotterMetricsPort": "0",
    "trust[0]": "registry.example/*",
    "convert[0]": "registry.example/team/*",
    "mountForm": "erofs",
    "oneFile": "true",
    "image.tag": "1.2.3",
    "imagePullSecrets[0].name": "pull",
}


def test_the_chart_with_everything_switched():
    found = rendered(*(f"--set={key}={value}" for key, value in ALL.items()))
    check_workloads(found)
    assert [item["handler"] for item in found if item["kind"] == "RuntimeClass"] == ["imgsnap"]
    text = yaml.safe_dump_all(found)
    assert "--image-service=/run/imgsnap/image-service.sock" in text
    assert "registry.example/imgsnap:1.2.3" in text and "--metrics" not in text
    assert "--trust=registry.example/*" in text and "--one-file" in text
    assert "--convert=registry.example/team/*" in text and "--mount-form=erofs" in text
    assert "node-registry" in text and "20GiB" in text


def test_helm_lint():
    helm = shutil.which("helm")
    if helm is None:
        pytest.skip("there is no helm")
    command = [helm, "lint", "--strict", str(CHART)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


def test_versions_agree():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__


def test_the_container_image_copies_what_the_build_needs():
    text = (DEPLOY / "image/Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M)
    names = [name for line in copied for name in line.split()]
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all((DEPLOY.parent / name).exists() for name in names)
    packages = re.search(r"^packages = \[(.*)\]$", project, re.M)
    assert packages is not None
    needed = {"pyproject.toml", "README.md", "LICENSE"}
    needed |= {name.split("/")[0] for name in re.findall(r'"(.+?)"', packages[1])}
    assert needed == set(names)
