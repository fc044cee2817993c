"""System calls that the standard library lacks: mount(2), umount2(2), statfs(2), loop ioctls.

Numbers and layouts: include/uapi/linux/mount.h, include/uapi/linux/loop.h, man statfs(2).
mount(8) is never used: it silently puts a loop device below a file-backed EROFS.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from enum import IntFlag
from pathlib import Path
from typing import NamedTuple

from imgsnap.errors import (
    AccessDenied,
    Busy,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unsupported,
)

OVERLAYFS_MAGIC = 0x794C7630
DATA_SIZE_MAX = 4095
"""mount(2) copies one page of options, with its terminating zero."""

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_READ_ONLY = 1
_LOOP_AUTOCLEAR = 4
_LOOP_ATTEMPTS = 16
_LOOP_CONFIG = struct.Struct("=II 24x QQ 4x 4x 4x I 64s 64x 32x 16x 64x")
"""struct loop_config: 0 4 fd · 4 4 block_size · 8 232 struct loop_info64 (32 8 lo_offset ·
40 8 lo_sizelimit · 60 4 lo_flags · 64 64 lo_file_name) · 240 64 reserved"""
assert _LOOP_CONFIG.size == 304

_SYS_OPENAT2 = 437
"""The same number on every architecture (include/uapi/asm-generic/unistd.h)."""
_RESOLVE_IN_ROOT = 0x10
_OPEN_HOW = struct.Struct("=QQQ")
"""struct open_how: 0 8 flags · 8 8 mode · 16 8 resolve"""
assert _OPEN_HOW.size == 24

_PR_SET_NAME = 15
_M_ARENA_MAX = -8
_M_MMAP_THRESHOLD = -3

_libc = ctypes.CDLL(None, use_errno=True)


class MountFlag(IntFlag):
    """MS_* of mount(2)."""

    RDONLY = 1
    NOSUID = 2
    NODEV = 4
    NOEXEC = 8
    BIND = 4096


class UmountFlag(IntFlag):
    """MNT_* and UMOUNT_* of umount2(2)."""

    DETACH = 2
    NOFOLLOW = 8


def mount(source: str, target: Path, fstype: str, flags: MountFlag, options: str = "") -> None:
    """mount(2). Raises OSError whose text names what was mounted where and with what options."""
    data = options.encode()
    if len(data) > DATA_SIZE_MAX:
        raise OSError(errno.E2BIG, f"mount options are over {DATA_SIZE_MAX} bytes")
    arguments = (source.encode(), os.fsencode(target), fstype.encode(), int(flags), data or None)
    if _libc.mount(*arguments):
        number = ctypes.get_errno()
        shown = f" with {options!r}" if options else ""
        what = f"mounting {fstype} from {source!r} on {str(target)!r}{shown}"
        raise OSError(number, f"{what}: {os.strerror(number)}")


def umount(target: Path, flags: UmountFlag = UmountFlag.NOFOLLOW) -> None:
    """umount2(2). Raises OSError; EINVAL and ENOENT mean that nothing is mounted there."""
    if _libc.umount2(os.fsencode(target), int(flags)):
        number = ctypes.get_errno()
        raise OSError(number, f"unmounting {str(target)!r}: {os.strerror(number)}")


def mount_error(error: OSError) -> ImgsnapError:
    """A failure of `mount` as one of our errors, with what the user can do about it."""
    text = error.strerror or str(error)
    if error.errno in (errno.EPERM, errno.EACCES):
        return AccessDenied(text, hint="mounting needs root (CAP_SYS_ADMIN)")
    if error.errno == errno.ENODEV:
        return Unsupported(text, hint="the kernel lacks this file system; try modprobe")
    if error.errno == errno.EBUSY:
        return Busy(text)
    if error.errno == errno.EUCLEAN:
        return IntegrityError(text, hint="the kernel finds the file system damaged; see dmesg")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(text)
    if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.E2BIG):
        return ResourceExhausted(text)
    if error.errno == errno.EINVAL:
        return InvalidArgument(text, hint="the kernel refuses these options; see dmesg")
    return ImgsnapError(text, hint="see dmesg for the kernel's reason")


class MountPoint(NamedTuple):
    """A line of /proc/self/mountinfo (man proc_pid_mountinfo)."""

    device: str  # "major:minor"
    target: Path
    fstype: str
    source: str
    options: str  # the file system's own


def mount_points() -> Iterator[MountPoint]:
    """All mounts of this namespace, in mount order: of two on one target the last is visible."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, _, after = line.partition(b" - ")
        fields, rest = before.split(b" "), after.split(b" ")
        target = Path(os.fsdecode(_unescape(fields[4])))
        source, options = (os.fsdecode(_unescape(field)) for field in rest[1:3])
        yield MountPoint(fields[2].decode(), target, rest[0].decode(), source, options)


def _unescape(field: bytes) -> bytes:
    """Undoes the kernel's octal escapes of blanks, tabs, newlines and backslashes."""
    first, *others = field.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in others)


def filesystem_magic(path: Path) -> int:
    """f_type of statfs(2). Raises OSError."""
    buffer = (ctypes.c_long * 32)()  # struct statfs is 15 longs; f_type is the first
    if _libc.statfs(os.fsencode(path), ctypes.byref(buffer)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(buffer[0]) & 0xFFFFFFFF


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the flock(2) of a file, which is made if need be; waits for others. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def sync_filesystem(path: Path) -> None:
    """syncfs(2): all that was written to the file system of `path` is on disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(path))
    finally:
        os.close(fd)


def attach_loop(file: Path) -> tuple[int, Path]:
    """Puts a read-only loop device over `file`: its open descriptor and its path.

    The device disappears when nothing uses it any more: close the descriptor after mounting.
    Raises OSError.
    """
    backing = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    control = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        for _ in range(_LOOP_ATTEMPTS):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            device = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            name = os.fsencode(file)[:63]
            flags = _LOOP_READ_ONLY | _LOOP_AUTOCLEAR
            try:
                fcntl.ioctl(
                    device, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(backing, 4096, 0, 0, flags, name)
                )
                return device, path
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another process took the free device first
                    raise
        raise OSError(errno.EBUSY, "no loop device stays free")
    finally:
        os.close(backing)
        if control >= 0:
            os.close(control)


def name_process(name: str) -> None:
    """PR_SET_NAME: what ps and the kernel's log show, at most 15 bytes."""
    _libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)


def raise_descriptor_limit() -> None:
    """The soft limit of open files to the hard one: an open extent takes two."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit_heap() -> None:
    """Keeps the C heap small: two arenas instead of eight per core, and chunk buffers (128 KiB
    and more) given back to the kernel when they are freed."""
    if hasattr(_libc, "mallopt"):  # not in musl
        _libc.mallopt(_M_ARENA_MAX, 2)
        _libc.mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def open_in_root(root: Path, path: str) -> int:
    """Opens `path` for reading as a process chrooted in `root` would: no symlink leads out.

    openat2(2) with RESOLVE_IN_ROOT, Linux 5.6. Raises OSError.
    """
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = _OPEN_HOW.pack(os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, 0, _RESOLVE_IN_ROOT)
        fd: int = _libc.syscall(_SYS_OPENAT2, directory, os.fsencode(path), how, len(how))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return fd
    finally:
        os.close(directory)


def mount_namespace() -> int:
    """Tells whether another process sees the same mounts."""
    return Path("/proc/self/ns/mnt").stat().st_ino
