"""mount(2) by ctypes: mount(8) would put a loop device below a file-backed EROFS."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1
MNT_DETACH = 2


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
