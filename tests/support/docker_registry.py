"""The distribution's docker-registry on loopback, with its access log."""

import contextlib
import json
import re
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.image_builder import Blobs

USER, PASSWORD = "tester", "secret"
_HTPASSWD = f"{USER}:$2b$04$CCvEqULZTQtf20kwaIOru.WriFOZuYn63bfNswlSspGKTKUFDS/l6\n"
_LINE = re.compile(r'"(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[\d.]+" (?P<status>\d+) (?P<size>\d+)')
_START_S = 20.0


@dataclass(frozen=True)
class Access:
    """One line of the access log; `size` is the bytes of the answer's body."""

    method: str
    path: str
    status: int
    size: int


@dataclass
class DockerRegistry:
    """Storage survives `stop` and `start`, and so does the address."""

    root: Path
    auth: bool = False
    certificate: tuple[Path, Path] | None = None  # certificate and key: speak TLS
    port: int = 0
    read_only: bool = False
    _process: subprocess.Popen[bytes] | None = None
    _marks: int = 0
    _read: int = field(default=0)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def storage(self) -> Path:
        return self.root / "storage"

    @property
    def log(self) -> Path:
        return self.root / "log"

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        config = self.root / "config.json"  # YAML is a superset of JSON
        config.write_text(json.dumps(self._config()))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, "docker-registry does not start"
                time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def _config(self) -> dict:
        http: dict = {"addr": self.address}
        if self.certificate:
            http["tls"] = dict(zip(("certificate", "key"), map(str, self.certificate), strict=True))
        config: dict = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": False}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
                "maintenance": {
                    "uploadpurging": {"enabled": False},
                    "readonly": {"enabled": self.read_only},
                },
            },
            "http": http,
        }
        if self.auth:
            htpasswd = self.root / "htpasswd"
            htpasswd.write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(htpasswd)}}
        return config

    def put(self, repository: str, blobs: Blobs) -> str:
        """Stores an image or index as any client would; returns its reference by tag."""
        for digest, data in blobs.by_digest.items():
            if not _is_manifest(data):
                self._put_blob(repository, digest, data)
        described = [entry for _, entry in blobs.names]
        for digest, data in blobs.by_digest.items():  # manifests come before their index
            if _is_manifest(data):
                self._put_manifest(repository, digest, data)
        for name, entry in blobs.names:
            self._put_manifest(repository, name, blobs.by_digest[entry["digest"]])
        assert described
        return f"{self.address}/{repository}:{blobs.names[0][0]}"

    def url(self, path: str) -> str:
        return f"http://{self.address}/v2/{path}"

    def _put_blob(self, repository: str, digest: str, data: bytes) -> None:
        request = urllib.request.Request(self.url(f"{repository}/blobs/uploads/"), method="POST")
        with urllib.request.urlopen(request) as answer:
            where = answer.headers["Location"]
        joint = "&" if "?" in where else "?"
        request = urllib.request.Request(
            f"{where}{joint}digest={digest}",
            data,
            {"Content-Type": "application/octet-stream"},
            method="PUT",
        )
        urllib.request.urlopen(request).close()

    def _put_manifest(self, repository: str, reference: str, data: bytes) -> None:
        request = urllib.request.Request(
            self.url(f"{repository}/manifests/{reference}"),
            data,
            {"Content-Type": json.loads(data)["mediaType"]},
            method="PUT",
        )
        urllib.request.urlopen(request).close()

    def accesses(self) -> list[Access]:
        """The requests since the last call. Lines are written after the answer: a marked request
        of our own shows that those before it are there."""
        self._marks += 1
        marker = f"/v2/?mark={self._marks}"
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{self.address}{marker}").close()
        deadline = time.monotonic() + _START_S
        while marker not in (text := self.log.read_text()[self._read :]):
            assert time.monotonic() < deadline, "no access log"
            time.sleep(0.01)
        self._read += len(text)
        lines = [_LINE.search(line) for line in text.splitlines()]
        return [
            Access(m["method"], m["path"], int(m["status"]), int(m["size"]))
            for m in lines
            if m and "/v2/?mark=" not in m["path"]
        ]

    def blob_file(self, digest: str) -> Path:
        """Where the registry keeps a blob, for tests that damage it."""
        name = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"


@contextlib.contextmanager
def running_registry(
    root: Path, *, auth: bool = False, certificate: tuple[Path, Path] | None = None
) -> Iterator[DockerRegistry]:
    """A registry that is ended with its storage left in `root`."""
    registry = DockerRegistry(root, auth, certificate)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()


@contextlib.contextmanager
def docker_registry() -> Iterator[str]:
    """``127.0.0.1:port`` of a fresh registry over plain HTTP, for tests that need no more."""
    with (
        tempfile.TemporaryDirectory(prefix="docker-registry-") as directory,
        running_registry(Path(directory)) as registry,
    ):
        yield registry.address


def _is_manifest(data: bytes) -> bool:
    if not data.startswith(b'{"schemaVersion"'):
        return False
    return "mediaType" in json.loads(data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
