"""QEMU's command line for a microVM.

The machine is ``microvm``: virtio devices on virtio-mmio, which the guest's kernel finds in the
machine's ACPI tables, and two serial ports. Firmware prints nothing without ``-nographic``.
virtio-pmem is a PCI device, so a machine with one is a ``q35``, whose virtio devices are on PCI.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from imgsnap.units import GIB, MIB, align_up

CONSOLE = "ttyS0"


class Accelerator(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    EMULATION = "tcg"


@dataclass(frozen=True, slots=True)
class Drive:
    """A raw disk: /dev/vda and so on, in order."""

    path: Path
    read_only: bool = True
    fd: int | None = None  # the file as QEMU inherits it; without, QEMU opens the path


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a machine is made of."""

    accelerator: Accelerator
    memory_mib: int = 256
    cpus: int = 1
    drives: tuple[Drive, ...] = ()
    pmem: Path | None = None  # a file mapped read-only into the guest: /dev/pmem0
    tap: str | None = None  # interface in QEMU's network namespace
    mac: str = "52:54:00:00:00:02"


@dataclass(frozen=True, slots=True)
class Boot:
    """What a machine starts from."""

    kernel: Path
    initramfs: Path
    parameters: tuple[str, ...] = ()  # more words for the kernel's command line


def command_line(
    program: str, hardware: Hardware, boot: Boot, console_fd: int, control_fd: int
) -> list[str]:
    """The arguments of a QEMU whose serial ports are two connected sockets it inherits."""
    machine, bus = ("microvm,rtc=on", "device") if hardware.pmem is None else ("q35", "pci")
    arguments = [program, "-M", machine, "-accel", hardware.accelerator.value]
    arguments += ["-cpu", "host" if hardware.accelerator is Accelerator.KVM else "max"]
    if hardware.pmem is None:
        arguments += ["-m", f"{hardware.memory_mib}M"]
    else:
        arguments += _pmem(hardware.pmem, hardware.memory_mib)
    arguments += ["-smp", str(hardware.cpus)]
    arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
    arguments += ["-append", " ".join([*kernel_parameters(hardware), *boot.parameters])]
    for name, fd in (("console", console_fd), ("control", control_fd)):
        arguments += ["-chardev", f"socket,id={name},fd={fd}"]
    arguments += ["-serial", "chardev:console", "-device", "isa-serial,chardev=control,index=1"]
    for number, drive in enumerate(hardware.drives):
        arguments += _drive(number, drive, bus)
    if hardware.tap is not None:
        arguments += ["-netdev", f"tap,id=net0,ifname={hardware.tap},script=no,downscript=no"]
        rom = ",romfile=" if bus == "pci" else ""  # no booting from the network
        arguments += ["-device", f"virtio-net-{bus},netdev=net0,mac={hardware.mac}{rom}"]
    return arguments


def _pmem(path: Path, memory_mib: int) -> list[str]:
    """Memory, and virtio-pmem, which is plugged in like memory: into a slot, with addresses for it.

    Raises OSError.
    """
    size = path.stat().st_size
    file = str(path).replace(",", ",,")
    backend = f"memory-backend-file,id=pmem0,mem-path={file},size={size}"
    return [
        "-m",
        f"{memory_mib}M,slots=1,maxmem={memory_mib + (align_up(size, GIB) + GIB) // MIB}M",
        "-object",
        f"{backend},share=on,readonly=on,rom=on",
        "-device",
        "virtio-pmem-pci,memdev=pmem0",
    ]


def _drive(number: int, drive: Drive, bus: str) -> list[str]:
    # The host's page cache is what all guests share: never O_DIRECT. Who may lose a scratch disk
    # needs no flushes.
    mode = "readonly=on" if drive.read_only else "cache=unsafe"
    if drive.fd is None:
        file, inherited = str(drive.path).replace(",", ",,"), []
    else:
        file, inherited = f"/dev/fdset/{number}", ["-add-fd", f"fd={drive.fd},set={number}"]
    return [
        *inherited,
        "-drive",
        f"id=disk{number},if=none,format=raw,{mode},file={file}",
        "-device",
        f"virtio-blk-{bus},drive=disk{number}",
    ]


def kernel_parameters(hardware: Hardware) -> list[str]:
    """The kernel's command line: quiet, and stopping rather than hanging."""
    words = [f"console={CONSOLE}", "quiet", "loglevel=1", "panic=-1", "reboot=t"]
    words += ["i8042.noaux", "i8042.nokbd", "random.trust_cpu=on"]
    if hardware.pmem is not None:
        # Addresses beyond 4 GiB make the kernel keep 64 MiB for devices that reach no further.
        words.append("swiotlb=noforce")
    if hardware.accelerator is Accelerator.EMULATION:
        # microvm has no second clock. Where the host takes the processor away while the kernel
        # measures the TSC, it gives up and then waits for ever: tell it (TCG's TSC is the host's).
        words += ["no_timer_check", "tsc=reliable"]
        khz = host_tsc_khz()
        words += [f"tsc_early_khz={khz}"] if khz else []
    return words


def host_tsc_khz(cpuinfo: Path = Path("/proc/cpuinfo")) -> int | None:
    """The rate of this machine's time stamp counter, as near as it says; None when it does not."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    # The nominal rate, where the model's name has it; the other one changes with the load.
    nominal = re.search(r"^model name\s*:.*@ ([0-9.]+)GHz", text, re.MULTILINE)
    if nominal:
        return int(float(nominal[1]) * 1_000_000)
    current = re.search(r"^cpu MHz\s*:\s*([0-9.]+)", text, re.MULTILINE)
    return int(float(current[1]) * 1000) if current else None
