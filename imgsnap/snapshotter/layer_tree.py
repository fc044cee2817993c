"""Writes one layer as a directory for overlayfs, from its index and its tar.

Every name is made by us in a directory that we made: directories are held open by descriptor, and
nothing that a layer brings is ever followed.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgsnap.convert.content import FileContent
from imgsnap.convert.layer import BuiltLayer, kept_xattrs
from imgsnap.errors import IntegrityError, LimitExceeded, Unsupported
from imgsnap.formats.layer_index import Kind, XattrSet
from imgsnap.snapshotter.lower_view import OPAQUE, LowerView
from imgsnap.snapshotter.overlay_plan import PlannedDirectory, plan

DEPTH_MAX = 512
"""Directories below each other: each is held open while those below it are written."""
_NO_OWNER = (1 << 32) - 1
"""chown(2) takes it for "leave as it is"."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TYPES = {
    Kind.CHAR_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
    Kind.FIFO: stat.S_IFIFO,
}
_COPY_SIZE = 1 << 30
"""Bytes asked of one sendfile(2), which stops at 2 GiB."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """What an inode of any kind has."""

    mode: int  # 0o7777
    uid: int
    gid: int
    mtime_ns: int
    xattrs: XattrSet

    @classmethod
    def of_file(cls, place: bytes) -> "Attributes":
        """Those of a file of a lower layer."""
        status = os.lstat(place)
        names = map(os.fsencode, os.listxattr(place, follow_symlinks=False))
        pairs = ((name, os.getxattr(place, name, follow_symlinks=False)) for name in sorted(names))
        return cls(
            stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            kept_xattrs(tuple(pairs)),
        )


IMPLIED = Attributes(0o755, 0, 0, 0, ())
"""Of a directory that no layer has an entry for, as in a snapshot."""


def write_layer(built: BuiltLayer, tar: int, directory: Path, lowers: Sequence[Path]) -> None:
    """Fills an empty directory with a layer in overlay form.

    `tar` is open on the layer's tar; `lowers` are the directories of the layers beneath in the
    same form, the uppermost first. Raises IntegrityError for a hard link into the layers beneath
    whose target is not there and for an owner that no file can have, LimitExceeded, Unsupported
    for an xattr that the file system refuses, OSError.
    """
    lower = LowerView(lowers)
    planned = plan(built.index.directories, lower)
    depth = max(len(item.parts) for item in planned)
    if depth > DEPTH_MAX:
        raise LimitExceeded("depth", depth, DEPTH_MAX, where="layer")
    root = os.open(directory, _DIRECTORY)
    try:
        _Writer(built, tar, root, lower).run(planned)
    finally:
        os.close(root)


class _Writer:
    def __init__(self, built: BuiltLayer, tar: int, root: int, lower: LowerView) -> None:
        self._index = built.index
        self._contents: Sequence[FileContent] = built.contents
        self._tar = tar
        self._root = root
        self._lower = lower
        self._first: dict[int, tuple[tuple[bytes, ...], bytes]] = {}  # where an inode was made

    def run(self, planned: Sequence[PlannedDirectory]) -> None:
        for fd, item in self._walk(planned, make=True):
            self._fill(fd, item)
        for fd, item in self._walk(planned, make=False):  # filling them changed their times
            if item.opaque:
                os.setxattr(fd, OPAQUE, b"y")
            self._finish_directory(fd, item)

    def _walk(
        self, planned: Sequence[PlannedDirectory], *, make: bool
    ) -> Iterator[tuple[int, PlannedDirectory]]:
        """Each directory with a descriptor, which is valid until the next."""
        trail: list[int] = []
        try:
            for item in planned:
                while len(trail) >= max(1, len(item.parts)):
                    os.close(trail.pop())
                if not item.parts:
                    yield self._root, item
                    continue
                parent, name = trail[-1] if trail else self._root, item.parts[-1]
                if make:
                    os.mkdir(name, 0o700, dir_fd=parent)
                trail.append(os.open(name, _DIRECTORY, dir_fd=parent))
                yield trail[-1], item
        finally:
            for fd in trail:
                os.close(fd)

    def _fill(self, fd: int, item: PlannedDirectory) -> None:
        for name in item.whiteouts:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=fd)
        for name, inode in zip(item.record.names, item.record.inodes, strict=True):
            place = item.parts, name
            first = self._first.setdefault(inode, place)
            if first != place:
                self._link(first, fd, name)
            elif inode < 0:
                self._copy_lower(fd, name, self._index.lower_links[-inode - 1])
            else:
                self._create(fd, name, inode)

    def _finish_directory(self, fd: int, item: PlannedDirectory) -> None:
        if item.record.inode >= 0:
            attributes = self._attributes(item.record.inode)
        elif item.beneath is not None:
            attributes = Attributes.of_file(item.beneath.places[0])
        else:
            attributes = IMPLIED
        _set_open(fd, attributes)

    def _attributes(self, inode: int) -> Attributes:
        columns = self._index.inodes
        return Attributes(
            columns.mode[inode],
            columns.uid[inode],
            columns.gid[inode],
            columns.mtime[inode] * 10**9 + columns.nsec[inode],
            self._index.xattr_sets[columns.xattrs[inode]],
        )

    def _create(self, fd: int, name: bytes, inode: int) -> None:
        columns = self._index.inodes
        kind = Kind(columns.kind[inode])
        attributes = self._attributes(inode)
        if kind is Kind.FILE:
            number = columns.file[inode]
            segments = self._contents[number - 1].segments if number else ()
            _write_file(fd, name, self._tar, columns.size[inode], segments, attributes)
        elif kind is Kind.SYMLINK:
            os.symlink(self._index.targets[columns.target[inode]], name, dir_fd=fd)
            _set_named(fd, name, attributes, is_link=True)
        else:
            os.mknod(name, _TYPES[kind] | 0o600, _device(columns.rdev[inode]), dir_fd=fd)
            _set_named(fd, name, attributes, is_link=False)

    def _link(self, first: tuple[tuple[bytes, ...], bytes], fd: int, name: bytes) -> None:
        parts, source = first
        directory = os.dup(self._root)
        try:
            for part in parts:
                below = os.open(part, _DIRECTORY, dir_fd=directory)
                os.close(directory)
                directory = below
            os.link(source, name, src_dir_fd=directory, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            os.close(directory)

    def _copy_lower(self, fd: int, name: bytes, target: bytes) -> None:
        """A hard link into the layers beneath: a copy, as overlayfs makes one for link(2)."""
        found = self._lower.find_through_links(target)
        if found is None or found.is_directory:
            problem = "is a directory" if found else "is in no lower layer"
            raise IntegrityError(f"target {target[:200]!r} of a hard link {problem}")
        place, status = found.places[0], found.status
        attributes = Attributes.of_file(place)
        if stat.S_ISREG(status.st_mode):
            source = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                whole = ((0, 0, status.st_size),)
                _write_file(fd, name, source, status.st_size, whole, attributes)
            finally:
                os.close(source)
        elif stat.S_ISLNK(status.st_mode):
            link = os.readlink(place)  # noqa: PTH115  names are bytes
            os.symlink(link, name, dir_fd=fd)
            _set_named(fd, name, attributes, is_link=True)
        else:
            os.mknod(name, stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev, dir_fd=fd)
            _set_named(fd, name, attributes, is_link=False)


def _write_file(
    parent: int,
    name: bytes,
    source: int,
    size: int,
    segments: Sequence[tuple[int, int, int]],
    attributes: Attributes,
) -> None:
    """A file of `size` bytes whose segments (offset in it, offset in the source, length) are those
    of `source`; the rest are holes."""
    fd = os.open(name, _CREATE, 0o600, dir_fd=parent)
    try:
        os.ftruncate(fd, size)
        for start, offset, length in segments:
            os.lseek(fd, start, os.SEEK_SET)
            while length:
                sent = os.sendfile(fd, source, offset, min(length, _COPY_SIZE))
                if not sent:
                    raise IntegrityError(f"the source of {name[:200]!r} is cut off at {offset}")
                offset, length = offset + sent, length - sent
        _set_open(fd, attributes)
    finally:
        os.close(fd)


def _set_open(fd: int, attributes: Attributes) -> None:
    """Owner before mode and xattrs: changing it takes set-id bits and capabilities away."""
    _check_owner(attributes)
    os.chown(fd, attributes.uid, attributes.gid)
    os.chmod(fd, attributes.mode)
    for name, value in attributes.xattrs:
        _set_xattr(fd, name, value)
    os.utime(fd, ns=(attributes.mtime_ns, attributes.mtime_ns))


def _set_named(parent: int, name: bytes, attributes: Attributes, *, is_link: bool) -> None:
    """For what cannot be opened without consequences: symlinks, devices, FIFOs."""
    _check_owner(attributes)
    os.chown(name, attributes.uid, attributes.gid, dir_fd=parent, follow_symlinks=False)
    if not is_link:  # links have no mode on Linux
        os.chmod(name, attributes.mode, dir_fd=parent)
    place = b"/proc/self/fd/%d/%s" % (parent, name)
    for key, value in attributes.xattrs:
        if not key.startswith(b"user."):  # the VFS keeps those for files and directories
            _set_xattr(place, key, value)
    times = (attributes.mtime_ns, attributes.mtime_ns)
    os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)


def _set_xattr(where: int | bytes, name: bytes, value: bytes) -> None:
    try:
        os.setxattr(where, name, value, follow_symlinks=isinstance(where, int))
    except OSError as error:
        raise Unsupported(
            f"xattr {os.fsdecode(name)[:100]!r} cannot be kept here: {error.strerror}",
            hint="the snapshotter's directory has to be on a file system with xattrs and ACLs",
        ) from error


def _check_owner(attributes: Attributes) -> None:
    if _NO_OWNER in (attributes.uid, attributes.gid):
        raise IntegrityError(f"no file can belong to {attributes.uid}:{attributes.gid}")


def _device(rdev: int) -> int:
    """From the layer index's encoding (linux/kdev_t.h, new_encode_dev)."""
    return os.makedev(rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00)
