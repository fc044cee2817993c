"""The files of an OCI image layout directory (image-spec, image-layout.md)::

    DIR/oci-layout              {"imageLayoutVersion": "1.0.0"}
    DIR/index.json              replaced by rename, by holders of the lock only
    DIR/blobs/sha256/<hex>      immutable once named so
    DIR/blobs/sha256/.tmp-*     being written; left behind by a crash, removed after a day
    DIR/.imgsnap.lock           flock for writers of index.json; readers need none
    DIR/.imgsnap.gc.lock        flock: shared by writers of blobs while they are at work,
                                exclusive for garbage collection

Content is hostile: nothing below DIR is reached through a symbolic link, and the only names
made from content are validated hex digests. DIR itself may be a link; the user chose it.
A blob is named after its bytes are on disk (fsync, rename, fsync of the directory), so a crash
leaves either no blob or a whole one.
"""

import errno
import fcntl
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from imgsnap.digest import Digest, digest_hex, parse_digest
from imgsnap.errors import (
    AccessDenied,
    AlreadyExists,
    Busy,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    UnsupportedFormat,
)
from imgsnap.oci import index_edit
from imgsnap.oci.blob_files import BlobFile, DescriptorFile
from imgsnap.oci.manifest import canonical_json, parse_json_object

LAYOUT_VERSION = "1.0.0"
INDEX_SIZE_MAX = 16 << 20
"""Bytes of index.json: about 50 000 names."""
COPY_SIZE = 8 << 20
STALE_AFTER_S = 24 * 3600
_LOCK_NAME = ".imgsnap.lock"
_USERS_NAME = ".imgsnap.gc.lock"
_OURS = frozenset({"index.json", "blobs", "oci-layout", _LOCK_NAME, _USERS_NAME, "imgsnap"})
"""What may stand in a directory that becomes a layout; imgsnap/ is the converter's chunk index."""
_TEMP_PREFIX = ".tmp-"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""No symbolic links, and no hanging on a named pipe that somebody put in a blob's place."""


class LayoutFiles:
    """Implements BlobFiles over a layout directory, and writes to it. Thread safe.

    Raises NotFound when there is no layout and `create` is False, InvalidArgument when
    `create` finds a directory with other things in it.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._index_lock = threading.Lock()
        self._users = -1
        with translated(path, f"image layout {path}"):
            if create:
                _create(path)
            self._root = os.open(path, _DIRECTORY)
        try:
            self._check_version()
            self._blobs = self._open_blobs()
            if create:
                self._use()
        except BaseException:
            os.close(self._root)
            raise

    def _use(self) -> None:
        """Keeps garbage collection away until close(), waiting for one that is under way."""
        with translated(self.path, f"image layout {self.path}"):
            self._users = self._open_users()
            fcntl.flock(self._users, fcntl.LOCK_SH)

    def _open_users(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(_USERS_NAME, flags, 0o644, dir_fd=self._root)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No writer is at work in the block, and none begins. Raises Busy while one is."""
        with translated(self.path, f"image layout {self.path}"):
            fd = self._open_users()
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"{self.path} is being written to",
                    hint="try again when the conversion has ended",
                ) from None
            yield
        finally:
            os.close(fd)

    def blobs(self) -> Iterator[tuple[str, os.stat_result]]:
        """Every file among the blobs, by name."""
        with translated(self.path, f"image layout {self.path}"):
            for name in sorted(os.listdir(self._blobs)):  # noqa: PTH208  (a descriptor)
                with suppress(FileNotFoundError):
                    yield name, os.lstat(name, dir_fd=self._blobs)

    def remove_blob(self, name: str) -> None:
        """Deletes a file among the blobs, by name; only while `alone`."""
        with translated(self.path, f"deleting blob {name} of {self.path}"):
            os.unlink(name, dir_fd=self._blobs)

    @property
    def name(self) -> str:
        """``oci:PATH``."""
        return f"oci:{self.path}"

    def index(self) -> bytes:
        """The bytes of index.json."""
        return self._read_small("index.json", INDEX_SIZE_MAX)

    def find(self, digest: Digest) -> BlobFile | None:
        """The blob with this digest, opened. Raises IntegrityError for anything but a file."""
        fd = self.open_fd(digest)
        if fd is None:
            return None
        return DescriptorFile(fd, 0, os.fstat(fd).st_size, f"blob {digest}", owned=True)

    def open_fd(self, digest: Digest) -> int | None:
        """A read-only descriptor of a blob, which the caller closes; None when there is none."""
        return self._open_file(digest_hex(parse_digest(digest)), self._blobs)

    def write(self, digest: Digest, size: int, fill: Callable[[int], None]) -> None:
        """Stores a blob: `fill` writes it to the descriptor it is given.

        A blob that is there with the right size is left alone. Raises IntegrityError when
        `fill` wrote another number of bytes, ResourceExhausted when the disk is full.
        """
        if self._size(digest) == size:
            return
        name = _TEMP_PREFIX + secrets.token_hex(8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with translated(self.path, f"writing blob {digest} to {self.path}"):
            fd = os.open(name, flags, 0o644, dir_fd=self._blobs)
            try:
                try:
                    fill(fd)
                    if os.fstat(fd).st_size != size:
                        raise IntegrityError(
                            f"blob {digest}: {os.fstat(fd).st_size} bytes written, {size} expected"
                        )
                    os.fsync(fd)
                finally:
                    os.close(fd)
                self._publish(name, digest)
            except BaseException:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._blobs)
                raise

    def link(self, digest: Digest, size: int, name: str, directory: int | None = None) -> bool:
        """Makes a file's bytes a blob by a hard link; False where the file system cannot.

        `name` is a path, or a name in the directory open as `directory`. The file must not be
        changed afterwards.
        """
        if self._size(digest) == size:
            return True
        temporary = _TEMP_PREFIX + secrets.token_hex(8)
        try:
            os.link(
                name,
                temporary,
                src_dir_fd=directory,
                dst_dir_fd=self._blobs,
                follow_symlinks=False,
            )
            self._sync_blob(temporary)
            self._publish(temporary, digest)
        except OSError:
            return False  # Another file system, too many links, no right to link: copy instead.
        finally:
            # rename() of two links to one file does nothing and leaves the temporary name.
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._blobs)
        return True

    def link_from(self, source: "LayoutFiles", digest: Digest, size: int) -> bool:
        """Takes a blob from another layout by a hard link; False when the systems differ."""
        return self.link(digest, size, digest_hex(digest), source._blobs)

    def edit_index(self, change: Callable[[index_edit.Index], bool]) -> None:
        """Applies `change` to index.json under the lock; it returns whether anything changed."""
        with translated(self.path, f"index.json of {self.path}"), self._locked():
            index = index_edit.from_bytes(self.index(), record=f"{self.name} index.json")
            if change(index):
                raw = index_edit.to_bytes(index, size_max=INDEX_SIZE_MAX)
                _replace(self._root, "index.json", raw)

    def close(self) -> None:
        """Closes the directories; open blobs stay open."""
        for name in ("_users", "_blobs", "_root"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def remove_stale(self) -> None:
        """Removes temporary files that a crash left behind more than a day ago."""
        oldest_s = time.time() - STALE_AFTER_S
        with translated(self.path, f"image layout {self.path}"):
            for name in os.listdir(self._blobs):  # noqa: PTH208  (a descriptor, not a path)
                if name.startswith(_TEMP_PREFIX):
                    with suppress(FileNotFoundError):
                        if os.lstat(name, dir_fd=self._blobs).st_mtime < oldest_s:
                            os.unlink(name, dir_fd=self._blobs)

    def _sync_blob(self, name: str) -> None:
        fd = os.open(name, os.O_RDONLY | _SAFE, dir_fd=self._blobs)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _publish(self, temporary: str, digest: Digest) -> None:
        os.rename(temporary, digest_hex(digest), src_dir_fd=self._blobs, dst_dir_fd=self._blobs)
        os.fsync(self._blobs)

    def _size(self, digest: Digest) -> int | None:
        fd = self.open_fd(digest)
        if fd is None:
            return None
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # flock is per open file, so threads of this process need a lock beside it.
        with self._index_lock:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(_LOCK_NAME, flags, 0o644, dir_fd=self._root)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                yield
            finally:
                os.close(fd)

    def _check_version(self) -> None:
        record = f"{self.name} oci-layout"
        try:
            marker = parse_json_object(self._read_small("oci-layout", 4096), record=record)
        except NotFound as error:
            raise NotFound(f"{self.path} is not an OCI image layout: it has no oci-layout") from (
                error
            )
        version = marker.get("imageLayoutVersion")
        if version != LAYOUT_VERSION:
            raise UnsupportedFormat(f"{self.path}: image layout version {str(version)[:40]!r}")

    def _open_blobs(self) -> int:
        with translated(self.path, f"image layout {self.path}"):
            outer = os.open("blobs", _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
            try:
                return os.open("sha256", _DIRECTORY | os.O_NOFOLLOW, dir_fd=outer)
            finally:
                os.close(outer)

    def _read_small(self, name: str, size_max: int) -> bytes:
        fd = self._open_file(name, self._root)
        if fd is None:
            raise NotFound(f"{self.path}/{name} does not exist")
        try:
            size = os.fstat(fd).st_size
            if size > size_max:
                raise IntegrityError(f"{self.path}/{name}: {size} bytes, over {size_max}")
            return DescriptorFile(fd, 0, size, name, owned=False).read_at(0, size)
        finally:
            os.close(fd)

    def _open_file(self, name: str, directory: int) -> int | None:
        """Opens a regular file, which must not be a symbolic link."""
        try:
            with translated(self.path, f"{self.path}: {name}"):
                fd = os.open(name, os.O_RDONLY | _SAFE, dir_fd=directory)
        except NotFound:
            return None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise IntegrityError(f"{self.path}: {name} is not a regular file")
        return fd


def write_all(fd: int, data: bytes) -> None:
    """Writes all of `data`, however often that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy_all(source: int, target: int) -> None:
    """Copies a whole file: shared blocks where the file system can, else inside the kernel."""
    position, size = 0, os.fstat(source).st_size
    while position < size:
        try:
            moved = os.copy_file_range(source, target, size - position, position)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            data = os.pread(source, COPY_SIZE, position)
            write_all(target, data)
            moved = len(data)
        if not moved:
            return  # The file shrank; the caller compares sizes.
        position += moved


@contextmanager
def translated(path: Path, what: str) -> Iterator[None]:
    """Turns an OSError into the error of our tree that tells the user what to do."""
    try:
        yield
    except OSError as error:
        raise _translate(error, path, what) from error


def _translate(error: OSError, path: Path, what: str) -> ImgsnapError:
    message = f"{what}: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(message, hint=f"free space on the file system of {path}")
    if error.errno == errno.ENOENT:
        return NotFound(message)
    if error.errno == errno.ELOOP:
        return IntegrityError(f"{what}: is a symbolic link, which a layout may not hold")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessDenied(message)
    if error.errno == errno.EEXIST:
        return AlreadyExists(f"{what}: it is something else", hint="name an empty directory")
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return IntegrityError(message)
    return Unavailable(message)


def _create(path: Path) -> None:
    """Makes an empty layout unless there is one; index.json first, the marker last."""
    path.mkdir(parents=True, exist_ok=True)
    if (path / "oci-layout").exists():
        return
    strange = [
        item.name
        for item in path.iterdir()
        if item.name not in _OURS and not item.name.startswith(_TEMP_PREFIX)
    ]
    if strange:
        raise InvalidArgument(
            f"{path} holds other files and is no OCI image layout", hint="name an empty directory"
        )
    (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    root = os.open(path, _DIRECTORY)
    try:
        lock = os.open(_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=root)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Another process may have finished the layout, and even written to it, meanwhile.
            if not (path / "oci-layout").exists():
                empty = canonical_json(index_edit.empty())
                _replace(root, "index.json", empty)
                marker = canonical_json({"imageLayoutVersion": LAYOUT_VERSION})
                _replace(root, "oci-layout", marker)
        finally:
            os.close(lock)
    finally:
        os.close(root)


def _replace(directory: int, name: str, data: bytes) -> None:
    """Replaces a file by rename; a crash leaves the old bytes or the new ones."""
    temporary = f"{_TEMP_PREFIX}{name}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o644, dir_fd=directory)
    try:
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)
