"""`imgsnap vm run` in tests: emulated, with the kernel of scripts/guest-kit."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imgsnap.vm.network import NAMESPACES
from tests.support.cli import Cli, Result
from tests.support.guest import BOOT_TRIES, KIT, GuestKit
from tests.support.node import Node

_EMULATOR_FAILED = ("the guest stopped", "the guest did not say 'started'")


@dataclass(frozen=True)
class Vm:
    """Guests of a node's snapshots."""

    node: Node
    kit: GuestKit

    @property
    def cli(self) -> Cli:
        return self.node.cli

    @property
    def env(self) -> dict[str, str]:
        return {"PATH": f"{KIT}:{os.environ['PATH']}"}

    def arguments(self, *arguments: object) -> list[object]:
        kernel = ["--kernel", self.kit.kernel, "--modules", self.kit.modules]
        return ["vm", "run", "--emulate", *kernel, "--memory", "256MiB", *arguments]

    def start(self, *arguments: object) -> subprocess.Popen:
        return self.cli.start(*self.arguments(*arguments), env=self.env)

    def run(self, *arguments: object) -> Result:
        """To the end. A boot that the emulator fails by itself is tried again, twice at most, and
        said."""
        for attempt in range(1, BOOT_TRIES + 1):
            result = self.cli.any(*self.arguments(*arguments), env=self.env)
            if not emulator_failed(result.code, result.err):
                break
            print(f"vm: boot {attempt} of {BOOT_TRIES} failed: {result.err}", file=sys.stderr)
        return result

    def fails(self, code: int, *arguments: object, env: Mapping[str, str] | None = None) -> str:
        """A run that must be refused as documented; what it wrote about it."""
        return self.cli.fails(code, "vm", "run", "--emulate", *arguments, env=env or self.env)

    def left(self) -> list[str]:
        """What runs should have taken away again; the daemon stays."""
        found = [f"attachment {item['id']}" for item in self.node.attachments()]
        found += [f"process {pid}" for pid in self.cli.processes() if _is_qemu(pid)]
        found += [f"namespace {path}" for path in NAMESPACES.glob("imgsnap-*") if self._ours(path)]
        return found + [f"file {path}" for path in self.cli.tmp.iterdir()]

    def _ours(self, namespace: Path) -> bool:
        """Not that of a run that another test has going."""
        pid = int(namespace.name.split("-")[1])
        return pid in self.cli.processes() or not Path(f"/proc/{pid}").exists()


def emulator_failed(code: int, err: str) -> bool:
    """Whether a run ended as those do whose emulator fails by itself."""
    return code == 6 and any(words in err for words in _EMULATOR_FAILED)


def _is_qemu(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return False
