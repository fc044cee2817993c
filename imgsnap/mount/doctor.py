"""Checks of what this machine needs to mount and run snapshots. Values only: the CLI prints."""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from imgsnap.errors import ImgsnapError
from imgsnap.mount import linux

KERNEL_FILE_BACKED = (6, 12)
KERNEL_EROFS = (5, 4)
_MODPROBE_TIMEOUT_S = 10


class Status(Enum):
    """FAIL: mounting cannot work. WARN: something optional is missing."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `hint` says what to do about it and is empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """Where to look, so that a test can show another machine."""

    root: Path = Path("/")
    uid: int = field(default_factory=os.geteuid)
    release: str = field(default_factory=lambda: os.uname().release)
    load_module: Callable[[str], bool] = field(default_factory=lambda: load_module)

    def path(self, name: str) -> Path:
        return self.root / name.lstrip("/")


Attempt = Callable[[], str]
"""Really does something; its text is the detail. Raises ImgsnapError or OSError."""


def examine(
    host: Host | None = None,
    *,
    try_mount: Attempt | None = None,
    probe_ranges: Attempt | None = None,
) -> Iterator[Check]:
    """All checks, one after the other.

    `try_mount` mounts a tiny EROFS image from a plain file and unmounts it; `probe_ranges` asks
    a registry for a part of a blob. What is not given is not checked.
    """
    host = host or Host()
    yield check_root(host)
    yield check_kernel(host)
    for name, needed_for in (("erofs", "snapshots"), ("fuse", "serving"), ("overlay", "--rw")):
        yield check_filesystem(host, name, needed_for)
    yield check_device(host, "fuse device", "/dev/fuse", Status.FAIL, "modprobe fuse")
    if try_mount is not None:
        yield attempt("file-backed EROFS mount", try_mount, Status.WARN, _FILE_BACKED_HINT)
    yield check_device(
        host,
        "ublk control device",
        "/dev/ublk-control",
        Status.WARN,
        "modprobe ublk_drv; only block devices for microVMs need it",
    )
    yield check_socket(host, "containerd", "/run/containerd/containerd.sock")
    yield check_program(host, "runc", "`imgsnap run` needs it")
    if probe_ranges is not None:
        hint = "lazy loading needs range requests; without them whole packs are fetched"
        yield attempt("registry range requests", probe_ranges, Status.WARN, hint)


_FILE_BACKED_HINT = (
    "Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE mounts files; a loop device is used instead"
)


def check_root(host: Host) -> Check:
    """Mounting needs CAP_SYS_ADMIN in the first user namespace."""
    if host.uid == 0:
        return Check("root", Status.OK, "running as root")
    return Check("root", Status.FAIL, f"running as user {host.uid}", "run with sudo")


def check_kernel(host: Host) -> Check:
    """6.12 mounts EROFS over a file; from 5.4 on it works through a loop device."""
    match = re.match(r"(\d+)\.(\d+)", host.release)
    version = (int(match[1]), int(match[2])) if match else (0, 0)
    detail = f"Linux {host.release}"
    if version >= KERNEL_FILE_BACKED:
        return Check("kernel", Status.OK, detail)
    if version >= KERNEL_EROFS:
        return Check("kernel", Status.WARN, detail, _FILE_BACKED_HINT)
    return Check("kernel", Status.FAIL, detail, "EROFS needs Linux 5.4 or newer")


def check_filesystem(host: Host, name: str, needed_for: str) -> Check:
    """Whether the kernel knows a file system, after loading its module if need be."""
    title = f"{name} file system"
    if _known(host, name):
        return Check(title, Status.OK, "in the kernel")
    if host.load_module(name) and _known(host, name):
        return Check(title, Status.OK, "module loaded")
    status = Status.WARN if name == "overlay" else Status.FAIL
    return Check(
        title, status, "the kernel does not have it", f"modprobe {name}; {needed_for} needs it"
    )


def check_device(host: Host, title: str, name: str, missing: Status, hint: str) -> Check:
    """A character device that must exist and be ours to open."""
    path = host.path(name)
    try:
        if not stat.S_ISCHR(path.stat().st_mode):
            return Check(title, missing, f"{name} is not a character device", hint)
    except OSError:
        return Check(title, missing, f"{name} does not exist", hint)
    if not os.access(path, os.R_OK | os.W_OK):
        return Check(title, missing, f"{name} cannot be opened by this user", "run as root")
    return Check(title, Status.OK, name)


def check_socket(host: Host, name: str, socket: str) -> Check:
    """A service that is optional."""
    try:
        if stat.S_ISSOCK(host.path(socket).stat().st_mode):
            return Check(name, Status.OK, socket)
        detail = f"{socket} is not a socket"
    except OSError:
        detail = f"{socket} does not exist"
    return Check(name, Status.WARN, detail, f"start {name} to use snapshots with it")


def check_program(host: Host, name: str, why: str) -> Check:
    """A program on the usual path."""
    for directory in ("usr/local/sbin", "usr/local/bin", "usr/sbin", "usr/bin", "sbin", "bin"):
        path = host.path(f"{directory}/{name}")
        if path.is_file() and os.access(path, os.X_OK):
            return Check(name, Status.OK, str(path))
    return Check(name, Status.WARN, "not found", f"install {name}; {why}")


def attempt(title: str, call: Attempt, failed: Status, hint: str) -> Check:
    """Runs something that proves a feature."""
    try:
        return Check(title, Status.OK, call())
    except (ImgsnapError, OSError) as error:
        own_hint = getattr(error, "hint", None)
        return Check(title, failed, str(error), own_hint or hint)


def file_backed_mount(image: bytes, directory: Path) -> str:
    """Mounts an EROFS image from a plain file in `directory`, and unmounts it: for `try_mount`.

    Raises OSError with the kernel's refusal.
    """
    file, target = directory / "tiny.erofs", directory / "tiny"
    file.write_bytes(image)
    target.mkdir()
    try:
        linux.mount(str(file), target, "erofs", linux.MountFlag.RDONLY)
        linux.umount(target)
    finally:
        target.rmdir()
        file.unlink()
    return "the kernel mounts EROFS over a file"


def load_module(name: str) -> bool:
    """modprobe; False when it fails or does not exist."""
    try:
        result = subprocess.run(
            ["modprobe", "--quiet", name],
            check=False,
            capture_output=True,
            timeout=_MODPROBE_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def _known(host: Host, name: str) -> bool:
    try:
        lines = host.path("/proc/filesystems").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[-1:] == [name] for line in lines)
