"""The processes of conversions: what they are told, how they end, what they leave."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imgsnap.digest import sha256_digest
from imgsnap.errors import ImgsnapError, InvalidArgument, Unavailable
from imgsnap.node.source import Source
from imgsnap.oci.locate import RegistryOptions
from imgsnap.snapshotter import conversion
from imgsnap.snapshotter.conversion import Conversions
from imgsnap.snapshotter.conversion_request import Request
from imgsnap.snapshotter.image_labels import registry_location
from imgsnap.snapshotter.node_settings import NodeSettings
from tests.support.node import wait_for

IMAGE = registry_location("registry.example/team/app:1")
MANIFEST = sha256_digest(b"manifest")


@pytest.fixture
def conversions(tmp_path: Path) -> Conversions:
    settings = NodeSettings(
        root=tmp_path / "root",
        run_dir=tmp_path / "run",
        cache_dir=tmp_path / "cache",
        store=tmp_path / "store",
        registry=RegistryOptions(headers=(("X-Secret", "hunter2"),)),
        environ={"DOCKER_CONFIG": "/creds", "OTHER": "x"},
    )
    settings.root.mkdir()
    return Conversions(settings)


def child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """What runs instead of a conversion: a script that has the request in `request`."""
    head = "import json, sys, time; request = json.load(sys.stdin)\n"

    def start() -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", head + script]
        return subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True)

    monkeypatch.setattr(conversion, "_start", start)


def test_what_a_process_is_told(conversions: Conversions, monkeypatch, tmp_path: Path):
    out = tmp_path / "told"
    child(monkeypatch, f"open({str(out)!r}, 'w').write(json.dumps(request))")
    conversions.convert(IMAGE, MANIFEST)
    told = Request.from_json(json.loads(out.read_text()))
    assert told.source.location == f"docker://registry.example/team/app@{MANIFEST}"
    assert told.source.options.headers == (("X-Secret", "hunter2"),)
    assert told.source.environ == (("DOCKER_CONFIG", "/creds"),)
    assert told.manifest == MANIFEST
    assert told.tag == f"sha256-{MANIFEST[7:]}.imgsnap"
    assert told.work_dir.parent == tmp_path / "root/converting"
    assert not list(told.work_dir.parent.iterdir()), "nothing is left"


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        ("sys.stderr.write('a\\nno room\\n'); sys.exit(9)", ImgsnapError, "no room"),
        ("sys.stderr.write('away\\n'); sys.exit(6)", Unavailable, "away"),
        ("import os; os.kill(os.getpid(), 9)", ImgsnapError, "exit status -9"),
        ("sys.stderr.write('x' * 5_000_000); sys.exit(1)", ImgsnapError, "x" * 1000),
    ],
)
def test_how_it_ends(conversions: Conversions, monkeypatch, script: str, error: type, said: str):
    child(monkeypatch, script)
    with pytest.raises(error) as caught:
        conversions.convert(IMAGE, MANIFEST)
    assert type(caught.value) is error and str(caught.value) == said


def test_one_that_takes_too_long_is_ended(conversions: Conversions, monkeypatch):
    monkeypatch.setattr(conversion, "CONVERSION_MAX_S", 0.1)
    child(monkeypatch, "time.sleep(1000)")
    with pytest.raises(ImgsnapError, match="longer than"):
        conversions.convert(IMAGE, MANIFEST)


def test_stopping(conversions: Conversions, monkeypatch, tmp_path: Path):
    begun, errors = tmp_path / "begun", []
    child(monkeypatch, f"open({str(begun)!r}, 'w').close(); time.sleep(1000)")

    def convert() -> None:
        try:
            conversions.convert(IMAGE, MANIFEST)
        except ImgsnapError as error:
            errors.append(str(error))

    thread = threading.Thread(target=convert)
    thread.start()
    wait_for(begun.exists, "the process")
    conversions.stop()
    thread.join(20)
    assert errors == ["exit status -15"]
    convert()
    assert errors[1:] == ["the snapshotter ends"], "and none begins any more"


@pytest.mark.parametrize(
    "change",
    [
        {"manifest": "sha256:../x"},
        {"manifest": None},
        {"work_dir": 1},
        {"source": {}},
        {"source": 1},
    ],
)
def test_a_request_that_is_none(tmp_path: Path, change: dict[str, object]):
    source = Source("docker://registry.example/app", tmp_path)
    value = Request(source, MANIFEST, tmp_path, tmp_path).to_json()
    assert Request.from_json(value).source == source
    with pytest.raises(InvalidArgument):
        Request.from_json(value | change)
