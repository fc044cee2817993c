"""Runs the distribution's docker-registry on loopback with its storage in a temporary directory."""

import json
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 30.0


@contextmanager
def docker_registry() -> Iterator[str]:
    """Yields ``127.0.0.1:port`` of a fresh registry over plain HTTP; ends it by its process id."""
    with tempfile.TemporaryDirectory(prefix="docker-registry-") as directory:
        port = _free_port()
        config = Path(directory, "config.yml")
        config.write_text(
            json.dumps(  # JSON is YAML.
                {
                    "version": "0.1",
                    "log": {"level": "error", "accesslog": {"disabled": True}},
                    "storage": {
                        "filesystem": {"rootdirectory": f"{directory}/storage"},
                        "delete": {"enabled": True},
                    },
                    "http": {"addr": f"127.0.0.1:{port}"},
                }
            )
        )
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen(
                ["docker-registry", "serve", str(config)], stdout=log, stderr=log
            )
        try:
            _wait(process, port, Path(directory, "log"))
            yield f"127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"docker-registry ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5):
                return
        except OSError as problem:
            if time.monotonic() > deadline:
                raise RuntimeError("docker-registry does not answer") from problem
            time.sleep(0.05)
