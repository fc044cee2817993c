"""Steps that change a tree, and trees as values to compare; as continuity's fs/fstest in Go."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

Step = Callable[[Path], None]


def steps(*several: Step) -> Step:
    def apply(root: Path) -> None:
        for step in several:
            step(root)

    return apply


def create_file(name: str, data: bytes, mode: int) -> Step:
    def apply(root: Path) -> None:
        (root / name).write_bytes(data)
        (root / name).chmod(mode)

    return apply


def create_dir(name: str, mode: int) -> Step:
    def apply(root: Path) -> None:
        (root / name).mkdir()
        (root / name).chmod(mode)

    return apply


def remove(name: str) -> Step:
    def apply(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def rename(old: str, new: str) -> Step:
    return lambda root: (root / old).replace(root / new)


def link(old: str, new: str) -> Step:
    return lambda root: os.link(root / old, root / new)


def chown(name: str, uid: int, gid: int) -> Step:
    return lambda root: os.lchown(root / name, uid, gid)


def tree(root: Path) -> dict[str, tuple]:
    """Everything below `root` but times: kinds, modes, owners, contents, which names are links."""
    found: dict[str, tuple] = {}
    first: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes(), first.setdefault(status.st_ino, name)
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif not stat.S_ISDIR(status.st_mode):
            content = status.st_rdev
        found[name] = status.st_mode, status.st_uid, status.st_gid, content
    return found
