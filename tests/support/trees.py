"""What a mounted tree looks like, as plain values that can be compared."""

import os
import stat
from dataclasses import dataclass, field


@dataclass
class Facts:
    """Everything that a container can see of one path."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int
    size: int  # 0 for directories: filesystems differ
    nlink: int
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    target: bytes = b""
    content: bytes = b""
    links: tuple[bytes, ...] = ()  # all paths of the same inode, if it is no directory


def observe(root: str | os.PathLike) -> dict[bytes, Facts]:
    """Facts by path of everything below `root`; b"" is the root itself.

    nlink is what the tree shows: overlayfs reports the count of the layer's own file system,
    names hidden by a whiteout included, and 1 for merged directories.
    """
    top = os.fsencode(root)
    found: dict[bytes, Facts] = {}
    inodes: dict[int, list[bytes]] = {}
    stack = [b""]
    while stack:
        path = stack.pop()
        full = os.path.join(top, path) if path else top
        status = os.lstat(full)
        found[path] = _facts(full, status)
        if stat.S_ISDIR(status.st_mode):
            names = os.listdir(full)
            stack += [path + b"/" + name if path else name for name in names]
        else:
            inodes.setdefault(status.st_ino, []).append(path)
    for paths in inodes.values():
        for path in paths:
            found[path].links = tuple(sorted(paths))
    return found


def visible_nlink(tree: dict[bytes, Facts]) -> dict[bytes, int]:
    """The link counts that the visible names imply."""
    counts = {
        path: len(facts.links) if not stat.S_ISDIR(facts.mode) else 2
        for path, facts in tree.items()
    }
    for path, facts in tree.items():
        if path and stat.S_ISDIR(facts.mode):
            counts[path.rpartition(b"/")[0]] += 1
    return counts


def _facts(full: bytes, status: os.stat_result) -> Facts:
    facts = Facts(
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev,
        size=0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        nlink=status.st_nlink,
        xattrs={
            os.fsencode(name): os.getxattr(full, name, follow_symlinks=False)
            for name in os.listxattr(full, follow_symlinks=False)
        },
    )
    if stat.S_ISLNK(status.st_mode):
        facts.target = os.readlink(full)
    elif stat.S_ISREG(status.st_mode):
        with open(full, "rb") as stream:
            facts.content = stream.read()
    return facts
