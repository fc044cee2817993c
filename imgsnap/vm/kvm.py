"""Whether KVM works here, as far as can be told without starting a guest."""

import fcntl
import os
from pathlib import Path

DEVICE = Path("/dev/kvm")
_GET_API_VERSION = 0xAE00
_CREATE_VM = 0xAE01
_API_VERSION = 12
"""Documentation/virt/kvm/api.rst, 4.1: stable, anything else is refused."""


def why_not(device: Path = DEVICE) -> str | None:
    """None when a virtual machine can be created, else the reason."""
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device}: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, _GET_API_VERSION, 0)
        if version != _API_VERSION:
            return f"{device} speaks version {version} of its interface"
        os.close(fcntl.ioctl(fd, _CREATE_VM, 0))
    except OSError as error:
        return f"{device} creates no machine: {error.strerror}"
    finally:
        os.close(fd)
    return None


class Refusals:
    """What machines that did not start under KVM left for the next ones, until the host reboots.

    A nested KVM may create machines in which no kernel ever comes up; to find out takes seconds.
    """

    def __init__(self, directory: Path) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._mark = directory / f"kvm-broken-{boot}"

    def known(self) -> bool:
        return self._mark.exists()

    def note(self) -> None:
        self._mark.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._mark.touch()
