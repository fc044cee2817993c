"""From a layer's tar entries to its index: one layer's own changes, independent of other layers.

Entries are taken in tar order, as an extracting runtime would: a later entry for a path replaces
an earlier one, a non-directory over a directory removes what was below it, an entry below a
symlink of the same layer goes to where the link points. What depends on lower layers (whiteouts,
hard links into them) is only recorded.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from imgsnap.convert.content import FileContent
from imgsnap.convert.tar import HARD_LINK, TarEntry
from imgsnap.digest import Digest
from imgsnap.errors import FormatError
from imgsnap.formats.layer_index import DirectoryRecord, Kind, LayerIndex, XattrSet
from imgsnap.formats.rules import Rules
from imgsnap.units import blocks_for

RECORD = "layer"
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
AUFS = b".wh..wh."
SYMLINKS_MAX = 40
"""As the kernel's MAXSYMLINKS."""

_XATTR_PREFIXES = (b"user.", b"trusted.", b"security.")
_XATTR_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
_XATTR_HIDDEN = b"trusted.overlay."
"""overlayfs keeps these to itself; from an image they would be instructions to it."""


@dataclass(slots=True, eq=False)
class _Inode:
    """One inode of the layer; hard links within the layer share it."""

    entry: TarEntry
    row: int = -1


@dataclass(slots=True)
class _LowerLink:
    """A hard link whose target is not in this layer."""

    target: bytes


@dataclass(slots=True)
class _Slot:
    """What a path holds, and when it came: a child older than its parent's slot is gone."""

    node: _Inode | _LowerLink
    sequence: int


@dataclass(frozen=True, slots=True)
class BuiltLayer:
    """A layer's index and, parallel to its files, where their bytes are in the tar."""

    index: LayerIndex
    contents: tuple[FileContent, ...]


def kept_xattrs(pairs: tuple[tuple[bytes, bytes], ...]) -> XattrSet:
    """The xattrs that Linux can hold and a container may see, sorted by name."""
    return tuple(
        (name, value)
        for name, value in pairs
        if (name.startswith(_XATTR_PREFIXES) and not name.startswith(_XATTR_HIDDEN))
        or name in _XATTR_ACLS
    )


class LayerBuilder:
    """Collects entries; `build` makes the index. Raises FormatError for impossible layers."""

    def __init__(self) -> None:
        self._slots: dict[bytes, _Slot] = {}
        self._cleared: dict[bytes, int] = {}  # path -> when a non-directory last stood there
        self._whiteouts: dict[bytes, set[bytes]] = {}
        self._opaque: set[bytes] = set()
        self._sequence = 0

    def add(self, entry: TarEntry) -> None:
        """Takes the next entry of the tar."""
        self._sequence += 1
        directory, _, name = entry.path.rpartition(b"/")
        if name.startswith(WHITEOUT):
            self._add_whiteout(directory, name)
            return
        if not entry.path and entry.kind != Kind.DIRECTORY:
            raise FormatError(RECORD, "entry", 0, "the root is not a directory")
        node = self._link(entry) if entry.kind == HARD_LINK else _Inode(entry)
        if node is None:
            return
        if entry.kind != Kind.DIRECTORY:
            self._cleared[entry.path] = self._sequence
        self._slots[entry.path] = _Slot(node, self._sequence)

    def _add_whiteout(self, directory: bytes, name: bytes) -> None:
        if name == OPAQUE:
            self._opaque.add(directory)
        elif not name.startswith(AUFS):
            hidden = name[len(WHITEOUT) :]
            if hidden in (b"", b".", b".."):
                raise FormatError(RECORD, "whiteout", 0, f"{name!r} hides no name")
            self._whiteouts.setdefault(directory, set()).add(hidden)

    def _link(self, entry: TarEntry) -> _Inode | _LowerLink | None:
        """The node that a hard link shares; None for a link to itself."""
        if entry.link == entry.path:
            return None
        slot = self._slots.get(entry.link)
        if slot is None:
            slot = self._slots.get(self._resolve(entry.link))
        if slot is None:
            return _LowerLink(entry.link)
        if isinstance(slot.node, _Inode) and slot.node.entry.kind == Kind.DIRECTORY:
            raise FormatError(RECORD, "hard link", 0, f"{entry.path!r} links to a directory")
        return slot.node

    def _resolve(self, path: bytes) -> bytes:
        """`path` with the symlinks of this layer among its parents followed."""
        budget = SYMLINKS_MAX
        parts = path.split(b"/")
        done: list[bytes] = []
        while len(parts) > 1:
            part = parts.pop(0)
            if part in (b"", b"."):
                continue
            if part == b"..":
                del done[-1:]
                continue
            done.append(part)
            slot = self._slots.get(b"/".join(done))
            if slot is None or not isinstance(slot.node, _Inode):
                continue
            target = slot.node.entry
            if target.kind != Kind.SYMLINK:
                continue
            budget -= 1
            if not budget:
                raise FormatError(RECORD, "entry", 0, f"{path[:200]!r}: too many symlinks")
            done = [] if target.link[:1] == b"/" else done[:-1]
            parts = target.link.split(b"/") + parts
        return b"/".join(done + parts)

    def _settle(self) -> dict[bytes, _Inode | _LowerLink]:
        """The layer's final paths: removed children dropped, parents' symlinks followed."""
        settled: dict[bytes, _Slot] = {}
        for path, slot in self._slots.items():
            place = self._survives(path, slot.sequence)
            if place is None:
                continue
            other = settled.get(place)
            if other is None or other.sequence < slot.sequence:
                settled[place] = slot
        return {path: settled[path].node for path in sorted(settled)}

    def _survives(self, path: bytes, sequence: int) -> bytes | None:
        """Where the path ends up; None when a later non-directory took a parent's place."""
        cleared = self._cleared
        end = path.rfind(b"/")
        through_link = False
        while end > 0:
            parent = path[:end]
            when = cleared.get(parent)
            if when is not None:
                if when > sequence:
                    return None
                node = self._slots[parent].node
                if isinstance(node, _LowerLink):
                    raise FormatError(RECORD, "entry", 0, f"{path[:200]!r} is below a file")
                if node.entry.kind == Kind.SYMLINK:
                    through_link = True
                elif node.entry.kind != Kind.DIRECTORY:
                    raise FormatError(RECORD, "entry", 0, f"{path[:200]!r} is below a file")
            end = path.rfind(b"/", 0, end)
        return self._resolve(path) if through_link else path

    def build(
        self, diff_id: Digest, rules: Rules, digest: Callable[[FileContent], bytes]
    ) -> BuiltLayer:
        """The layer's index. `digest` hashes a file's content with BLAKE3."""
        index = LayerIndex(diff_id, rules)
        nodes = self._settle()
        directories = self._directories(nodes)
        contents = _Rows(index, digest)
        links: dict[bytes, int] = {}
        for path, node in nodes.items():
            directory, _, name = path.rpartition(b"/")
            if isinstance(node, _LowerLink):
                number = links.setdefault(node.target, len(links))
                row = -number - 1
            else:
                row = contents.row(node)
                if node.entry.kind == Kind.DIRECTORY:
                    directories[path].inode = row
                    continue
            record = directories[directory]
            record.names.append(name)
            record.inodes.append(row)
        index.lower_links = list(links)
        index.directories = [directories[path] for path in sorted(directories)]
        return BuiltLayer(index, tuple(contents.files))

    def _directories(self, nodes: dict[bytes, _Inode | _LowerLink]) -> dict[bytes, DirectoryRecord]:
        """A record for each directory and each parent of anything, keyed by path."""
        records: dict[bytes, DirectoryRecord] = {b"": DirectoryRecord(b"")}

        def ensure(path: bytes) -> DirectoryRecord:
            """The record of a directory; it and its parents are made if need be."""
            record = records.get(path)
            if record is not None:
                return record
            parent = path
            while parent not in records:
                node = nodes.get(parent)
                if node is not None and (
                    isinstance(node, _LowerLink) or node.entry.kind != Kind.DIRECTORY
                ):
                    raise FormatError(RECORD, "entry", 0, f"{parent[:200]!r} is not a directory")
                records[parent] = DirectoryRecord(parent)
                parent = parent.rpartition(b"/")[0]
            return records[path]

        for path, node in nodes.items():
            if isinstance(node, _Inode) and node.entry.kind == Kind.DIRECTORY:
                record = ensure(path)
                # Before it, the layer put something else there: that took what lower layers had.
                record.opaque = path in self._cleared
            elif path:
                ensure(path.rpartition(b"/")[0])
        for path, names in self._whiteouts.items():
            if self._is_directory_place(path, nodes):
                ensure(path).whiteouts = sorted(names)
        for path in self._opaque:
            if self._is_directory_place(path, nodes):
                ensure(path).opaque = True
        return records

    def _is_directory_place(self, path: bytes, nodes: dict[bytes, _Inode | _LowerLink]) -> bool:
        """False when this layer puts a non-directory at the path or at one of its parents: then
        everything below it is hidden anyway, and the whiteout says nothing."""
        while path:
            node = nodes.get(path)
            if isinstance(node, _LowerLink):
                return False
            if node is not None and node.entry.kind != Kind.DIRECTORY:
                return False
            path = path.rpartition(b"/")[0]
        return True


class _Rows:
    """Fills the inode and file columns in path order, so that rows are a function of the tree."""

    def __init__(self, index: LayerIndex, digest: Callable[[FileContent], bytes]) -> None:
        self._index = index
        self._digest = digest
        self._by_digest: dict[bytes, int] = {}
        self._xattrs: dict[XattrSet, int] = {(): 0}
        self._targets: dict[bytes, int] = {}
        self.files: list[FileContent] = []

    def row(self, node: _Inode) -> int:
        if node.row < 0:
            node.row = self._append(node.entry)
        return node.row

    def _append(self, entry: TarEntry) -> int:
        columns = self._index.inodes
        columns.kind.append(entry.kind)
        columns.mode.append(entry.mode)
        columns.uid.append(entry.uid)
        columns.gid.append(entry.gid)
        columns.mtime.append(entry.mtime)
        columns.nsec.append(entry.nsec)
        columns.size.append(entry.size if entry.kind == Kind.FILE else 0)
        columns.file.append(self._file(entry) if entry.kind == Kind.FILE and entry.size else 0)
        columns.rdev.append(_encode_device(entry))
        columns.xattrs.append(self._xattr_set(kept_xattrs(entry.xattrs)))
        columns.target.append(self._target(entry.link) if entry.kind == Kind.SYMLINK else 0)
        return len(columns) - 1

    def _file(self, entry: TarEntry) -> int:
        """Row + 1 in the file columns; equal contents share one."""
        content = FileContent(entry.size, entry.segments)
        digest = self._digest(content)
        number = self._by_digest.get(digest)
        if number is None:
            columns = self._index.files
            columns.digest += digest
            columns.size.append(entry.size)
            columns.block.append(self._index.extent_blocks)
            self._index.extent_blocks += blocks_for(entry.size)
            self.files.append(content)
            number = self._by_digest[digest] = len(columns)
        return number

    def _xattr_set(self, pairs: XattrSet) -> int:
        number = self._xattrs.setdefault(pairs, len(self._xattrs))
        if number == len(self._index.xattr_sets):
            self._index.xattr_sets.append(pairs)
        return number

    def _target(self, target: bytes) -> int:
        number = self._targets.setdefault(target, len(self._targets))
        if number == len(self._index.targets):
            self._index.targets.append(target)
        return number


def _encode_device(entry: TarEntry) -> int:
    """linux/kdev_t.h new_encode_dev: 12 bits of major, 20 of minor."""
    if entry.kind not in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
        return 0
    if not (0 <= entry.major < 1 << 12 and 0 <= entry.minor < 1 << 20):
        raise FormatError(RECORD, "device", 0, f"{entry.major}:{entry.minor} is out of range")
    return (entry.minor & 0xFF) | entry.major << 8 | (entry.minor & ~0xFF) << 12


def build_layer(
    entries: Iterable[TarEntry],
    diff_id: Digest,
    rules: Rules,
    digest: Callable[[FileContent], bytes],
) -> BuiltLayer:
    """The index of the layer whose tar has these entries."""
    builder = LayerBuilder()
    for entry in entries:
        builder.add(entry)
    return builder.build(diff_id, rules, digest)
