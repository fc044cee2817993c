"""Planning EROFS metadata: which inodes there are, in which order, and where each one goes.

Inodes are numbered depth first: a directory's children are neighbours, so listing a directory
touches few blocks. The root is number 0 and is placed first, since its nid has only 16 bits.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from imgsnap.convert.flatten import Directory, Tree
from imgsnap.formats import erofs
from imgsnap.formats.erofs_xattr import encode_xattrs, xattr_count
from imgsnap.formats.layer_index import Kind
from imgsnap.units import BLOCK_SIZE, align_up, blocks_for

INODE_SIZE = erofs.EXTENDED_INODE.size
DIRENT_SIZE = erofs.DIRENT.size
_SLOT = 1 << erofs.SLOT_BITS
_FIRST_INODE = erofs.SUPER_OFFSET + erofs.SUPERBLOCK.size
_DOTS = (b".", b"..")

assert _FIRST_INODE % _SLOT == 0


@dataclass(slots=True)
class Rows:
    """The columns of all layers, one after the other, and the implicit directory's row."""

    kind: array[int] = field(default_factory=lambda: array("B"))
    mode: array[int] = field(default_factory=lambda: array("H"))
    uid: array[int] = field(default_factory=lambda: array("I"))
    gid: array[int] = field(default_factory=lambda: array("I"))
    mtime: array[int] = field(default_factory=lambda: array("q"))
    nsec: array[int] = field(default_factory=lambda: array("I"))
    size: array[int] = field(default_factory=lambda: array("Q"))
    rdev: array[int] = field(default_factory=lambda: array("I"))
    block: list[int] = field(default_factory=list)  # 1 + block behind the metadata; 0: none
    xattrs: list[int] = field(default_factory=list)  # index into xattr_sets, 0: none
    target: list[int] = field(default_factory=list)  # index into targets
    xattr_sets: list[tuple[tuple[bytes, bytes], ...]] = field(default_factory=list)
    targets: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class DirectoryPlan:
    """A directory's entries in order, and how they are cut into directory blocks."""

    inode: int
    names: list[bytes]  # sorted, with . and ..
    inodes: list[int]  # parallel: numbers, not nids
    cuts: list[int]  # end of each block in names
    size: int  # bytes


@dataclass(slots=True)
class Numbering:
    """Inodes in depth-first order; index 0 is the root."""

    rows: list[int] = field(default_factory=list)  # row in Rows of each inode
    nlink: list[int] = field(default_factory=list)
    directories: dict[int, DirectoryPlan] = field(default_factory=dict)  # by inode number


@dataclass(slots=True)
class Placement:
    """Where each inode and each piece of data that does not fit inline goes."""

    nids: array[int] = field(default_factory=lambda: array("I"))
    formats: array[int] = field(default_factory=lambda: array("I"))  # with xattr_count << 16
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    xattrs: dict[int, bytes] = field(default_factory=dict)  # bodies by inode number
    bodies: dict[int, bytes] = field(default_factory=dict)  # the same by set
    inline: dict[int, int] = field(default_factory=dict)  # byte offset of inline data
    data: dict[int, int] = field(default_factory=dict)  # first data block behind the inodes
    inode_bytes: int = _FIRST_INODE  # end of the last inode
    data_blocks: int = 0


def join_rows(tree: Tree) -> Rows:
    rows = Rows()
    first_block = 1
    for layer in tree.layers:
        columns = layer.inodes
        for name in ("kind", "mode", "uid", "gid", "mtime", "nsec", "size", "rdev"):
            getattr(rows, name).extend(getattr(columns, name))
        blocks = [0, *(block + first_block for block in layer.files.block)]
        rows.block += map(blocks.__getitem__, columns.file)
        first_xattrs, first_target = len(rows.xattr_sets), len(rows.targets)
        # Set 0 of every layer is the empty one and must stay 0.
        rows.xattrs += [i and i + first_xattrs for i in columns.xattrs]
        rows.target += [i + first_target for i in columns.target]
        rows.xattr_sets += layer.xattr_sets
        rows.targets += layer.targets
        first_block += layer.extent_blocks
    rows.kind.append(Kind.DIRECTORY)
    rows.mode.append(0o755)
    for column in (rows.uid, rows.gid, rows.mtime, rows.nsec, rows.size, rows.rdev):
        column.append(0)
    for numbers in (rows.block, rows.xattrs, rows.target):
        numbers.append(0)
    return rows


def number_inodes(root: Directory, rows: Rows) -> Numbering:
    """Numbers the inodes: a directory's children together, then subdirectory by subdirectory."""
    done = Numbering([root.row], [2])
    shared: dict[int, int] = {}  # row -> number, of non-directories: they may be hard links
    stack = [(root, 0, 0)]
    all_rows, nlink = done.rows, done.nlink
    while stack:
        directory, number, parent = stack.pop()
        names = sorted(directory.children)
        numbers = []
        below = []
        for child in map(directory.children.__getitem__, names):
            next_number = len(all_rows)
            if isinstance(child, int):
                found = shared.setdefault(child, next_number)
                numbers.append(found)
                if found != next_number:
                    nlink[found] += 1
                    continue
                all_rows.append(child)
                nlink.append(1)
            else:
                numbers.append(next_number)
                all_rows.append(child.row)
                nlink.append(2)
                nlink[number] += 1
                below.append((child, next_number, number))
        stack.extend(reversed(below))
        done.directories[number] = _plan_directory(number, parent, names, numbers)
    return done


def _plan_directory(
    number: int, parent: int, names: list[bytes], numbers: list[int]
) -> DirectoryPlan:
    if names and names[0] < b"..":
        # Names such as "!" and "-" sort before "..", or even before ".".
        pairs = sorted([*zip(names, numbers, strict=True), (b".", number), (b"..", parent)])
        names, numbers = [name for name, _ in pairs], [child for _, child in pairs]
    else:
        names, numbers = [*_DOTS, *names], [number, parent, *numbers]
    total = DIRENT_SIZE * len(names) + sum(map(len, names))
    if total <= BLOCK_SIZE:
        return DirectoryPlan(number, names, numbers, [len(names)], total)
    cuts = []
    used = 0
    for index, name in enumerate(names):
        need = DIRENT_SIZE + len(name)
        if used + need > BLOCK_SIZE:
            cuts.append(index)
            used = 0
        used += need
    cuts.append(len(names))
    return DirectoryPlan(number, names, numbers, cuts, (len(cuts) - 1) * BLOCK_SIZE + used)


def _path(numbering: Numbering, number: int) -> str:
    """A path of an inode, for an error message; searches, so only for that."""
    parts: list[bytes] = []
    while number:
        for plan in numbering.directories.values():
            found = [n for n, i in zip(plan.names, plan.inodes, strict=True) if i == number]
            if found and found[0] not in _DOTS:
                parts.append(found[0])
                number = plan.inode
                break
    return "/" + b"/".join(reversed(parts)).decode(errors="backslashreplace")


def place_inodes(rows: Rows, numbering: Numbering) -> Placement:
    place = Placement()
    kinds = rows.kind
    position = _FIRST_INODE
    for number, row in enumerate(numbering.rows):
        kind = kinds[row]
        if kind not in (Kind.DIRECTORY, Kind.SYMLINK) and not rows.xattrs[row]:
            place.nids.append(position >> erofs.SLOT_BITS)
            place.formats.append(erofs.LAYOUT_EXTENDED)
            place.sizes.append(rows.size[row])
            position += INODE_SIZE
        else:
            position = _place_complex(rows, numbering, place, number, position)
    place.inode_bytes = position
    return place


def _xattr_body(rows: Rows, numbering: Numbering, place: Placement, number: int) -> bytes:
    """Encoded once for each set: a labelled image has few sets and an xattr on every inode."""
    chosen = rows.xattrs[numbering.rows[number]]
    body = place.bodies.get(chosen)
    if body is None:
        body = encode_xattrs(rows.xattr_sets[chosen], lambda: _path(numbering, number))
        place.bodies[chosen] = body
    return body


def _place_complex(
    rows: Rows, numbering: Numbering, place: Placement, number: int, position: int
) -> int:
    """Places an inode with xattrs or with data of its own; returns the end, slot aligned.

    Inode and xattrs may cross a block boundary, inline data may not. It is written inline only
    if all of it fits one block, and is then moved to the next block where needed.
    """
    row = numbering.rows[number]
    kind = rows.kind[row]
    body = b""
    if rows.xattrs[row]:
        body = place.xattrs[number] = _xattr_body(rows, numbering, place, number)
    size = rows.size[row]
    head = INODE_SIZE + len(body)
    tail = 0
    if kind in (Kind.DIRECTORY, Kind.SYMLINK):
        if kind == Kind.DIRECTORY:
            size = numbering.directories[number].size
        else:
            size = len(rows.targets[rows.target[row]])
        tail = size % BLOCK_SIZE
        if head + tail > BLOCK_SIZE:
            tail = 0
        blocks = blocks_for(size - tail)
        if blocks:
            place.data[number] = place.data_blocks
            place.data_blocks += blocks
    if tail and position % BLOCK_SIZE + head + tail > BLOCK_SIZE:
        position = align_up(position, BLOCK_SIZE)
    layout = erofs.FLAT_PLAIN
    if tail:
        layout = erofs.FLAT_INLINE
        place.inline[number] = position + head
    place.nids.append(position >> erofs.SLOT_BITS)
    place.formats.append(erofs.LAYOUT_EXTENDED | layout << 1 | xattr_count(len(body)) << 16)
    place.sizes.append(size)
    return align_up(position + head + tail, _SLOT)
