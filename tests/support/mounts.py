"""mount(2) by ctypes: mount(8) would put a loop device below a file-backed EROFS."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from imgsnap.mount import linux

_libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
CLONE_NEWNS = 0x20000
_SNAPSHOTS = ("overlay", "erofs", "fuse")


def mount(source: str, target: Path, kind: str, flags: int = 0, options: str = "") -> None:
    arguments = (source.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    if _libc.mount(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"mount {kind} {source} {options}")


def unmount(target: Path) -> None:
    if _libc.umount2(os.fsencode(target), 0) and _libc.umount2(os.fsencode(target), MNT_DETACH):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


@contextlib.contextmanager
def mounted(
    source: str, target: Path, kind: str, flags: int = 0, options: str = ""
) -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    mount(source, target, kind, flags, options)
    try:
        yield target
    finally:
        unmount(target)


@contextlib.contextmanager
def private_namespace() -> Iterator[None]:
    """A mount namespace of our own: whatever a test leaves mounted, or is killed with, is gone.

    It begins without the snapshots that other tests have mounted: its copies would keep those busy.
    """
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    directory = os.getcwd()
    try:
        _check(_libc.unshare(CLONE_NEWNS), "unshare")
        try:
            mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
            for point in reversed(list(linux.mount_points())):
                if point.fstype.startswith(_SNAPSHOTS) and point.target != Path("/"):
                    _libc.umount2(os.fsencode(point.target), MNT_DETACH)
            yield
        finally:
            _check(_libc.setns(before, CLONE_NEWNS), "setns")
            os.chdir(directory)
    finally:
        os.close(before)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
