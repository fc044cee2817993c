"""The distribution's docker-registry on loopback, and images put into it."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.images import Image
from harness.options import skip
from harness.processes import end, output_of, running

START_S = 30.0
LOG_S = 2.0
_REQUEST = re.compile(r'"([A-Z]+) (\S+) HTTP/[\d.]+" (\d+) (\d+)')


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry, which counts by its access log."""

    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def mark(self) -> int:
        """The access log's end, for `since`."""
        self._settle()
        return self.log.stat().st_size

    def since(self, mark: int) -> dict[str, int]:
        """GETs, those of blobs, all requests and bytes of bodies, answered after the mark."""
        self._settle()
        with self.log.open("rb") as file:
            file.seek(mark)
            found = _REQUEST.findall(file.read().decode(errors="replace"))
        return {
            "requests": len(found),
            "gets": sum(method == "GET" for method, *_ in found),
            "blob_gets": sum(method == "GET" and "/blobs/" in path for method, path, *_ in found),
            "body_bytes": sum(int(size) for *_, size in found),
        }

    def _settle(self) -> None:
        """Waits until the log, which is written after the answers, stops growing."""
        size, deadline = -1, time.monotonic() + LOG_S
        while time.monotonic() < deadline:
            now = self.log.stat().st_size
            if now == size:
                return
            size = now
            time.sleep(0.05)


@contextlib.contextmanager
def docker_registry(work: Path) -> Iterator[Registry]:
    """A fresh registry over plain HTTP that keeps all below `work`."""
    if shutil.which("docker-registry") is None:
        raise skip("docker-registry is not installed")
    port = _free_port()
    config, log = work / "registry.yml", work / "registry.log"
    value = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": False}},
        "storage": {"filesystem": {"rootdirectory": str(work / "registry")}},
        "http": {"addr": f"127.0.0.1:{port}", "secret": "perf"},
    }
    config.write_text(json.dumps(value))  # JSON is YAML
    command = ["docker-registry", "serve", str(config)]
    with (
        log.open("wb") as out,
        running(command, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        _wait(port, process, log)
        yield Registry(port, log)
        end(process)


def push(image: Image, address: str, repository: str | None = None) -> str:
    """Copies an image to a registry, its bytes unchanged; returns its reference there."""
    reference = f"{address}/{repository or image.name}:latest"
    command = ["skopeo", "copy", "--quiet", "--insecure-policy", "--preserve-digests"]
    command += ["--dest-tls-verify=false", f"oci:{image.layout}:{image.tag}"]
    output_of([*command, f"docker://{reference}"])
    return reference


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: "subprocess.Popen[str]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"error: docker-registry: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)
