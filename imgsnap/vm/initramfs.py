"""The initramfs of a guest: a cpio archive that the kernel unpacks as its first root.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from imgsnap.errors import InvalidArgument, Unsupported
from imgsnap.vm.modules import Module

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_ALIGNMENT = 4
_SIZE_MAX = 0xFFFF_FFFF
"""Numbers are eight hexadecimal digits."""
_APPLETS = (
    "base64", "cat", "chmod", "chown", "chroot", "dmesg", "grep", "insmod", "ip", "ln", "ls",
    "mkdir", "mount", "reboot", "rm", "setsid", "sh", "sleep", "stat", "stty", "sync", "umount",
)  # fmt: skip
_DIRECTORIES = ("bin", "dev", "etc", "mnt", "modules", "new", "proc", "sys")
_ELF_MAGIC = b"\x7fELF"
_PT_INTERP = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the archive; `mode` with the file type, as in stat(2)."""

    name: str  # relative, no leading slash
    mode: int
    data: bytes = b""  # a symbolic link's target
    device: tuple[int, int] = (0, 0)  # major and minor of a device node


def directory(name: str) -> Entry:
    return Entry(name, stat.S_IFDIR | 0o755)


def file(name: str, data: bytes, *, executable: bool = False) -> Entry:
    return Entry(name, stat.S_IFREG | (0o755 if executable else 0o644), data)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as a newc archive, all owned by root and of the epoch.

    Parents must come before children. Raises InvalidArgument for a file over 4 GiB.
    """
    out = bytearray()
    for number, entry in enumerate((*entries, Entry(_TRAILER, 0)), start=1):
        if len(entry.data) > _SIZE_MAX:
            raise InvalidArgument(f"{entry.name}: too large for an initramfs")
        out += _header(entry, number)
        _align(out)
        out += entry.data
        _align(out)
    return bytes(out)


def _header(entry: Entry, number: int) -> bytes:
    name = entry.name.encode() + b"\0"
    fields = (number, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    return _MAGIC + b"".join(b"%08X" % field for field in fields) + name


def _align(out: bytearray) -> None:
    out += bytes(-len(out) % _ALIGNMENT)


def guest(busybox: Path, modules: Sequence[Module], extra: Iterable[Entry] = ()) -> bytes:
    """The initramfs of our guests: busybox, the modules in loading order, and our init.

    `extra` is added as it is. Raises OSError, and Unsupported for a busybox that is not static.
    """
    program = busybox.read_bytes()
    if not is_static(program):
        raise Unsupported(
            f"{busybox} needs shared libraries, which a guest's first root has none of",
            hint="install a static one: apt-get install busybox-static",
        )
    init = resources.files("imgsnap.vm").joinpath("init/init.sh").read_bytes()
    entries = [directory(name) for name in _DIRECTORIES]
    entries.append(Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)))
    entries.append(Entry("dev/null", stat.S_IFCHR | 0o666, device=(1, 3)))
    entries.append(file("bin/busybox", program, executable=True))
    entries += [link(f"bin/{name}", "busybox") for name in _APPLETS]
    entries.append(file("init", init, executable=True))
    for number, module in enumerate(modules):
        # The shell expands names in order; the number keeps ours.
        entries.append(file(f"modules/{number:03}-{module.name}.ko", module.data))
    return archive([*entries, *extra])


def is_static(program: bytes) -> bool:
    """Whether a 64-bit little-endian ELF program names no interpreter. False for anything else."""
    if program[:4] != _ELF_MAGIC or program[4:6] != b"\x02\x01" or len(program) < 64:
        return False
    offset = int.from_bytes(program[32:40], "little")
    size = int.from_bytes(program[54:56], "little")
    count = int.from_bytes(program[56:58], "little")
    kinds = (program[at : at + 4] for at in range(offset, offset + size * count, max(size, 1)))
    return all(int.from_bytes(kind, "little") != _PT_INTERP for kind in kinds)
