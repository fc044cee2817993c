"""A scripted registry with one blob, credentials for it, and a certificate."""

import json
import subprocess

import pytest

from tests.support.registry import ScriptedRegistry
from tests.unit.oci.reading import DATA, NAME


@pytest.fixture
def registry():
    with ScriptedRegistry() as scripted:
        scripted.add_blob(NAME, DATA)
        yield scripted


@pytest.fixture
def auth_file(tmp_path, registry):
    path = tmp_path / "config.json"
    entry = {"username": registry.username, "password": registry.password}
    path.write_text(json.dumps({"auths": {registry.host: entry}}))
    return path


@pytest.fixture(scope="session")
def tls_files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=test"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return str(certificate), str(key)
