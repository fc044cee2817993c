"""The directories of containerd snapshots.

    snapshots/<id>/fs, work     of the row <id>; work only for writable ones
    snapshots/new-…             being made, for a row that does not exist yet
    removed/…                   of no row any more; deleted when there is time
    unpacking/, converting/     scratch of the process that runs; discarded when one starts

A directory gets its number inside the transaction that adds its row, and is moved to `removed`
after the one that takes it, so a row without a directory never exists; a directory without a row
may after a kill, and goes at the next start.
"""

import logging
import os
import re
import secrets
import stat
import tempfile
import threading
from pathlib import Path

from imgsnap.errors import InvalidArgument, NotFound
from imgsnap.mount import linux
from imgsnap.snapshotter.rows import Usage

SNAPSHOTS = "snapshots"
REMOVED = "removed"
UNPACKING = "unpacking"
CONVERTING = "converting"
_FORBIDDEN = re.compile(r'[,:\\"\s]')
_NEW = "new-"
_log = logging.getLogger(__name__)


def make_root(root: Path) -> None:
    """Makes sure of a snapshotter's directory. Raises InvalidArgument when it cannot be."""
    try:
        root.mkdir(parents=True, mode=0o700, exist_ok=True)
    except OSError as error:
        raise InvalidArgument(
            f"{root} cannot be a snapshotter's directory: {error.strerror}",
            hint="name another with --root",
        ) from error


class Directories:
    """Safe for threads."""

    def __init__(self, root: Path) -> None:
        """Makes what is missing below `root`.

        Raises InvalidArgument for a path that overlayfs could not have in its options.
        """
        if _FORBIDDEN.search(str(root)) or not root.is_absolute():
            raise InvalidArgument(
                f"{str(root)!r} cannot be a snapshotter's directory: overlayfs could not name it",
                hint="an absolute path without blanks, commas, colons, quotes and backslashes",
            )
        self._root = root
        self._snapshots = root / SNAPSHOTS
        self._removed = root / REMOVED
        self._emptying = threading.Lock()
        for directory in (self._snapshots, self._removed):
            directory.mkdir(mode=0o700, exist_ok=True)

    def fs(self, row_id: int) -> Path:
        """The tree of a row: what it adds to the rows beneath."""
        return self._snapshots / str(row_id) / "fs"

    def work(self, row_id: int) -> Path:
        """The directory that overlayfs works in."""
        return self._snapshots / str(row_id) / "work"

    # Making ----------------------------------------------------------------------------------

    def create(self, *, writable: bool) -> Path:
        """A new directory with an empty tree, for `settle` or `discard`."""
        directory = Path(tempfile.mkdtemp(prefix=_NEW, dir=self._snapshots))
        (directory / "fs").mkdir()
        (directory / "fs").chmod(0o755)  # whatever the umask is
        if writable:
            (directory / "work").mkdir()
            (directory / "work").chmod(0o711)
        return directory

    def settle(self, directory: Path, row_id: int) -> Path:
        """Gives a directory of `create` to a row; its new path."""
        return directory.rename(self._snapshots / str(row_id))

    def sync(self, directory: Path) -> None:
        """Returns when all that was written to the directory is on disk."""
        linux.sync_filesystem(directory)

    # Removing --------------------------------------------------------------------------------

    def discard(self, directory: Path) -> None:
        """Takes a directory out of use; it is deleted by `empty_removed`. Missing ones are fine."""
        try:
            directory.rename(self._removed / f"{directory.name}-{secrets.token_hex(8)}")
        except FileNotFoundError:
            return

    def drop(self, row_id: int) -> None:
        """As `discard`, for the directory of a row that is gone."""
        self.discard(self._snapshots / str(row_id))

    def numbers(self) -> set[int]:
        """The ids that have a directory."""
        return {int(path.name) for path in self._snapshots.iterdir() if path.name.isdigit()}

    def discard_unused(self, used: set[int]) -> None:
        """Discards every directory but those of the rows `used`; only while nobody makes any."""
        for path in list(self._snapshots.iterdir()):
            if not (path.name.isdigit() and int(path.name) in used):
                _log.info("removing %s, which no snapshot uses", path)
                self.discard(path)

    def discard_scratch(self) -> None:
        """Discards what a killed process was decompressing; before anything is unpacked."""
        for name in (UNPACKING, CONVERTING):
            self.discard(self._root / name)

    def empty_removed(self) -> None:
        """Deletes what was discarded. What cannot be deleted is logged and stays."""
        with self._emptying:
            stuck: set[Path] = set()
            while paths := [path for path in self._removed.iterdir() if path not in stuck]:
                for path in paths:
                    try:
                        _delete(path, self._removed)
                    except OSError as error:
                        _log.warning("cannot delete %s: %s", path, error)
                        stuck.add(path)

    # Measuring -------------------------------------------------------------------------------

    def usage(self, row_id: int) -> Usage:
        """What a row's tree takes on disk now. Raises NotFound."""
        try:
            return measure(self.fs(row_id))
        except FileNotFoundError as error:
            raise NotFound(f"{error.filename} is missing") from error


def take_over(lower: Path, upper: Path) -> None:
    """Gives `upper` owner and mode of `lower`: an overlay's root shows those of its upper."""
    found = lower.stat()
    os.chown(upper, found.st_uid, found.st_gid)
    upper.chmod(stat.S_IMODE(found.st_mode))


def measure(tree: Path) -> Usage:
    """Bytes and inodes of a tree that may change meanwhile; other file systems in it excluded.

    Raises FileNotFoundError when there is no such tree.
    """
    found = tree.lstat()
    size, inodes, linked = found.st_blocks * 512, 1, set()
    pending = [str(tree)]
    while pending:
        directory = pending.pop()
        try:
            entries = list(os.scandir(directory))
        except OSError as error:  # gone by now, or its path is too long for the kernel
            _log.debug("not measured: %s", error)
            continue
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if status.st_dev != found.st_dev or status.st_ino in linked:
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.append(entry.path)
            elif status.st_nlink > 1:
                linked.add(status.st_ino)
            size += status.st_blocks * 512
            inodes += 1
    return Usage(size, inodes)


def _delete(path: Path, removed: Path) -> None:
    """Deletes an entry of `removed`; directories in it that are not empty become entries there.

    So neither the depth of a tree nor the length of its paths, which are a container's choice,
    costs stack, descriptors or names.
    """
    if not stat.S_ISDIR(path.lstat().st_mode):
        path.unlink()
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os.scandir(fd) as entries:
            for entry in entries:
                _take_out(fd, entry, removed)
    finally:
        os.close(fd)
    path.rmdir()


def _take_out(fd: int, entry: os.DirEntry[str], removed: Path) -> None:
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.name, dir_fd=fd)
        return
    try:
        os.rmdir(entry.name, dir_fd=fd)
    except OSError:
        os.rename(entry.name, removed / secrets.token_hex(16), src_dir_fd=fd)
