"""A registry behind a link of given rate and round-trip time: the corpus's `shaped-registry`.

It prints one JSON line when it is ready, one with its counts on SIGUSR1, and forgets them on
SIGUSR2; "push" is a second, unshaped door to the same storage.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from harness.processes import running

ANSWER_S = 30.0
QUIET_S = 0.2


@dataclass(frozen=True, slots=True)
class ShapedRegistry:
    """`address` is behind the link, `door` is not."""

    address: str
    door: str
    pid: int
    output: IO[str]

    def reset(self) -> None:
        os.kill(self.pid, signal.SIGUSR2)
        time.sleep(QUIET_S)

    def counts(self) -> dict[str, Any]:
        """Requests, bytes on the wire and more since `reset`."""
        time.sleep(QUIET_S)  # the access log's last lines
        os.kill(self.pid, signal.SIGUSR1)
        return _line(self.output)


@contextlib.contextmanager
def shaped_registry(tools: Path, storage: Path, rate: str, rtt: str) -> Iterator[ShapedRegistry]:
    command = [sys.executable, str(tools / "shaped-registry"), "--storage", str(storage)]
    command += ["--rate", rate, "--rtt", rtt]
    with running(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        ready = _line(process.stdout)
        yield ShapedRegistry(ready["address"], ready["push"], int(ready["pid"]), process.stdout)


def _line(output: IO[str]) -> dict[str, Any]:
    if not select.select([output], [], [], ANSWER_S)[0]:
        raise SystemExit("error: shaped-registry does not answer")
    line = output.readline()
    if not line:
        raise SystemExit("error: shaped-registry ended")
    value: dict[str, Any] = json.loads(line)
    return value
