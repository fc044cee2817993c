"""A guest to run commands in, under emulation, with QEMU and kernel from scripts/guest-kit.

::

    with running_guest(kit(), disks=[image], modules=["ublk_drv"]) as guest:
        done = guest.run("cat /etc/os-release; ls /dev/ublk*")
        assert done.status == 0, done.output

One boot serves many tests: use it with session or module scope. The first disk is the root, an
EROFS (below a writable overlay); commands run in it, as root, by its own /bin/sh. Further disks are
/dev/vdb and so on. A boot that the emulator fails by itself is tried again, twice at most, and
said.
"""

import contextlib
import fcntl
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from imgsnap.vm.initramfs import guest
from imgsnap.vm.machine import GuestStopped, Machine, write_initramfs
from imgsnap.vm.modules import ModuleTree
from imgsnap.vm.qemu import Accelerator, Boot, Drive, Hardware
from tests.support.cli import REPOSITORY

KIT = REPOSITORY / ".guest-kit"
"""Where scripts/guest-kit unpacks, once for all tests."""
BOOT_LIMIT_S = 90.0
BOOT_TRIES = 3
_MODULES = ("virtio_mmio", "virtio_blk", "erofs", "overlay")


@dataclass(frozen=True, slots=True)
class GuestKit:
    """A QEMU and a guest kernel with its modules."""

    qemu: str
    kernel: Path
    modules: Path


@dataclass(frozen=True, slots=True)
class Done:
    """A command that has ended: standard output and error are one."""

    status: int
    output: str


@cache
def find_kit() -> GuestKit | str:
    """The kit, or the reason why there is none."""
    KIT.mkdir(exist_ok=True)
    with (KIT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        script = [str(REPOSITORY / "scripts/guest-kit"), str(KIT)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        return done.stderr.strip()[-300:]
    return GuestKit(str(KIT / "qemu-system-x86_64"), KIT / "vmlinuz", KIT / "modules")


def kit() -> GuestKit:
    """The kit; fails the test, with the reason, when it cannot be had."""
    found = find_kit()
    if isinstance(found, str):
        pytest.fail(found)
    return found


@dataclass
class Guest:
    """A guest that has come up."""

    machine: Machine

    def run(self, command: str, *, limit_s: float = 60.0) -> Done:
        """Runs a shell command in the root disk's tree; `limit_s` is generous, the host is slow."""
        said = bytearray()
        script = f"exec chroot . /bin/sh -c {shlex.quote(command)}"
        status = self.machine.run(script, said.extend, limit_s=limit_s)
        return Done(status, said.decode(errors="replace"))

    def check(self, command: str, *, limit_s: float = 60.0) -> str:
        """The output of a command that must succeed."""
        done = self.run(command, limit_s=limit_s)
        assert done.status == 0, f"{command}: {done.status}\n{done.output}"
        return done.output


@contextlib.contextmanager
def running_guest(
    kit: GuestKit,
    disks: Sequence[Path],
    *,
    modules: Sequence[str] = (),
    memory_mib: int = 512,
    cpus: int = 1,
    parameters: Sequence[str] = (),
) -> Iterator[Guest]:
    """A guest with these read-only disks; `modules` are loaded besides what the root needs."""
    with tempfile.TemporaryDirectory(prefix="guest-") as name:
        loaded = ModuleTree(kit.modules.resolve()).load_order([*_MODULES, *modules])
        initramfs = write_initramfs(Path(name), guest(_busybox(), loaded))
        drives = tuple(Drive(disk) for disk in disks)
        hardware = Hardware(Accelerator.EMULATION, memory_mib, cpus, drives)
        boot = Boot(kit.kernel, initramfs, tuple(parameters))
        with _booted(kit.qemu, hardware, boot) as machine:
            yield Guest(machine)


@contextlib.contextmanager
def _booted(qemu: str, hardware: Hardware, boot: Boot) -> Iterator[Machine]:
    for attempt in range(1, BOOT_TRIES + 1):
        with Machine(qemu, hardware, boot) as machine:
            begin = time.monotonic()
            try:
                machine.wait_started(BOOT_LIMIT_S)
                machine.wait_ready(BOOT_LIMIT_S)
            except GuestStopped as error:
                _say(f"boot {attempt} of {BOOT_TRIES} failed: {error} ({error.hint})")
                _say(machine.boot_log())
                if attempt == BOOT_TRIES or "did not come up" in str(error):  # not the emulator's
                    raise
                continue
            _say(f"boot {attempt} took {time.monotonic() - begin:.1f} s")
            yield machine
            return


def _busybox() -> Path:
    return Path("/usr/bin/busybox").resolve()


def _say(line: str) -> None:
    print(f"guest: {line}", file=sys.stderr)
