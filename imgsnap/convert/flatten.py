"""Flattening: the layers of an image merged into one tree, as overlayfs shows them.

Rules, in the order in which a layer is applied to what lies below it:

* A whiteout or an opaque directory hides only what lower layers have; what the layer itself
  adds under the same name stays, whatever the order was in the tar.
* A directory over a directory merges. The upper attributes win if the layer has an entry for
  the directory; a directory that is only implied by its children keeps the lower attributes.
* A directory that is only implied by its children, over a symlink, stands for the directory that
  the symlink leads to inside the root, as an extracting runtime finds it; what is missing on the
  way is made. Of two paths of one layer that meet so, the later in byte order counts.
* Anything else replaces what was there, with all that was below it.
* Names of one layer that share an inode row stay hard links of each other. A link to a lower
  layer joins the inode that the *lower* layers have at that path, symlinks among its parents
  followed. Extractors go in tar order, so
  a link written before its target is removed or replaced in the same layer succeeds there; it
  must succeed here, and with the old inode.

A directory that no layer has an entry for is 0755 root:root with mtime 0.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from imgsnap.convert.limits import NAME_MAX
from imgsnap.errors import IntegrityError
from imgsnap.formats.layer_index import DirectoryRecord, Kind, LayerIndex

SYMLINKS_MAX = 40
"""As the kernel's MAXSYMLINKS."""
BROKEN = "the image is broken; build it again"


@dataclass(slots=True)
class Directory:
    """A directory of the merged tree.

    Removing a subtree is dropping the one reference to its Directory: nothing refers upwards.
    """

    row: int  # see Tree
    children: dict[bytes, "int | Directory"] = field(default_factory=dict)


@dataclass(slots=True)
class Tree:
    """The merged tree.

    Inodes are numbers: row r of layer k is `first_rows[k] + r`. Equal numbers are hard links.
    `implicit_row`, one past all rows, stands for a directory without attributes of its own.
    """

    layers: tuple[LayerIndex, ...]  # lowest first
    first_rows: tuple[int, ...]
    implicit_row: int
    root: Directory


def flatten(layers: Sequence[LayerIndex]) -> Tree:
    """Merges `layers`, lowest first.

    Raises IntegrityError for a hard link whose target no lower layer has.
    """
    ends = tuple(accumulate((len(layer.inodes) for layer in layers), initial=0))
    tree = Tree(tuple(layers), ends[:-1], ends[-1], Directory(ends[-1]))
    for layer, first_row in zip(layers, ends, strict=False):
        _apply(tree, layer, first_row)
    return tree


def _apply(tree: Tree, layer: LayerIndex, first_row: int) -> None:
    # Before anything changes: links see the lower layers only.
    linked = [_link_target(tree, path, layer) for path in layer.lower_links]
    by_path: dict[bytes, Directory] = {}
    # Sorted paths: a parent, with its whiteouts, comes before its children.
    for record in layer.directories:
        directory = by_path[record.path] = _enter(tree, by_path, record)
        children = directory.children
        if record.inode >= 0:
            directory.row = first_row + record.inode
        if record.opaque:
            children.clear()
        for name in record.whiteouts:
            children.pop(name, None)
        for name, row in zip(record.names, record.inodes, strict=True):
            children[name] = first_row + row if row >= 0 else linked[-row - 1]


def _enter(tree: Tree, by_path: dict[bytes, Directory], record: DirectoryRecord) -> Directory:
    """The merged directory of `record`; made, in place of a non-directory, if it is not there.

    A symlink is followed, unless the layer has an entry for the directory: that replaces it.
    """
    if not record.path:
        return tree.root
    parent_path, _, name = record.path.rpartition(b"/")
    siblings = by_path[parent_path].children
    found = siblings.get(name)
    if isinstance(found, Directory):
        return found
    if found is not None and record.inode < 0 and _symlink(tree, found) is not None:
        followed = _follow(tree, record.path.split(b"/"), make=True)
        assert followed is not None
        return followed
    directory = siblings[name] = Directory(tree.implicit_row)
    return directory


def _symlink(tree: Tree, inode: int) -> bytes | None:
    """The target when the inode is a symlink."""
    # The last of equal first rows: layers without inodes share theirs with the next.
    number = bisect_right(tree.first_rows, inode) - 1
    layer, row = tree.layers[number], inode - tree.first_rows[number]
    columns = layer.inodes
    if columns.kind[row] != Kind.SYMLINK:
        return None
    return layer.targets[columns.target[row]]


def _follow(tree: Tree, path: Sequence[bytes], *, make: bool) -> Directory | None:
    """The directory at `path`, symlinks followed inside the root.

    What is missing is made, or None is returned. Raises IntegrityError for a circle.
    """
    trail = [tree.root]
    budget = SYMLINKS_MAX
    todo = list(reversed(path))
    while todo:
        name = todo.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            del trail[max(1, len(trail) - 1) :]
            continue
        found = trail[-1].children.get(name)
        target = _symlink(tree, found) if isinstance(found, int) else None
        if target is not None:
            budget -= 1
            if budget < 0:
                raise IntegrityError(
                    f"{b'/'.join(path)!r}: more than {SYMLINKS_MAX} symlinks", hint=BROKEN
                )
            if target[:1] == b"/":
                del trail[1:]
            todo += reversed(target.split(b"/"))
            continue
        if not isinstance(found, Directory):
            if not make:
                return None
            if len(name) > NAME_MAX:
                raise IntegrityError(
                    f"{b'/'.join(path)[:200]!r}: a symlink leads to a name over {NAME_MAX} bytes",
                    hint=BROKEN,
                )
            found = trail[-1].children[name] = Directory(tree.implicit_row)
        trail.append(found)
    return trail[-1]


def _link_target(tree: Tree, path: bytes, layer: LayerIndex) -> int:
    """The inode that the lower layers have at `path`; a symlink there is not followed itself."""
    *parents, name = path.split(b"/")
    directory = _follow(tree, parents, make=False)
    found = directory.children.get(name) if directory is not None else None
    if isinstance(found, int):
        return found
    problem = "is a directory" if found else "is in no lower layer"
    raise IntegrityError(
        f"layer {layer.diff_id}: target {path!r} of a hard link {problem}", hint=BROKEN
    )
