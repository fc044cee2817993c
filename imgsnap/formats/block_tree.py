"""The block tree of an extent: a hash over its blocks by which a few blocks can be checked alone.

Leaf: BLAKE3-256 of a block's 4096 bytes. Node: BLAKE3-256 of its two children, 64 bytes, so no leaf
can pass for a node. The last node of a level without a sibling moves up as it is (as in RFC 9162).
A node is named by (level, index): it covers blocks [index << level, (index + 1) << level).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from imgsnap.errors import FormatError
from imgsnap.units import BLOCK_SIZE

RECORD = "block tree"
HASH_BYTES = 32
EMPTY_ROOT = bytes(HASH_BYTES)
"""Of an extent without blocks."""
LEVELS_MAX = 33
"""Extents have at most 2^32 - 1 blocks."""

Node = tuple[int, int]
"""(level, index)."""


def leaves(data: bytes | memoryview) -> list[bytes]:
    """The leaf of each block of `data`, which is whole blocks."""
    from blake3 import blake3

    view = memoryview(data)
    return [blake3(view[at : at + BLOCK_SIZE]).digest() for at in range(0, len(view), BLOCK_SIZE)]


def join(left: bytes, right: bytes) -> bytes:
    """The node above two."""
    from blake3 import blake3

    digest: bytes = blake3(left + right).digest()
    return digest


class TreeHasher:
    """The root of blocks that come in order; holds one hash a level."""

    def __init__(self) -> None:
        self._count = 0
        self._complete: list[bytes] = []  # the largest subtree first

    def update(self, data: bytes | memoryview) -> None:
        """Takes the next blocks."""
        for leaf in leaves(data):
            node, count = leaf, self._count
            while count & 1:  # as many subtrees of this size end here as the count has trailing 1s
                node = join(self._complete.pop(), node)
                count >>= 1
            self._complete.append(node)
            self._count += 1

    @property
    def root(self) -> bytes:
        if not self._complete:
            return EMPTY_ROOT
        *others, node = self._complete
        for left in reversed(others):
            node = join(left, node)
        return node


def build(first: Sequence[bytes]) -> list[list[bytes]]:
    """All levels of a tree from its leaves up; the last has the root alone."""
    levels = [list(first)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        above = [join(below[at], below[at + 1]) for at in range(0, len(below) - 1, 2)]
        levels.append(above + below[len(below) & ~1 :])
    return levels


def cover(first: int, count: int) -> Iterator[Node]:
    """The fewest nodes that cover blocks [first, first + count), in order of their blocks."""
    end = first + count
    while first < end:
        level = (first & -first).bit_length() - 1 if first else LEVELS_MAX
        level = min(level, (end - first).bit_length() - 1)
        yield level, first >> level
        first += 1 << level


def run_nodes(first: int, own: Sequence[bytes]) -> list[bytes]:
    """The hashes of `cover` for a run of blocks with these leaves."""
    found: list[bytes] = []
    at = 0
    for level, _ in cover(first, len(own)):
        row = list(own[at : at + (1 << level)])
        at += 1 << level
        while len(row) > 1:
            row = [join(row[n], row[n + 1]) for n in range(0, len(row), 2)]
        found += row
    return found


def prove(levels: Sequence[Sequence[bytes]], nodes: Iterable[Node]) -> list[bytes]:
    """The hashes that `root_of` needs beside those of `nodes`, which are disjoint."""
    proof: list[bytes] = []
    given = _by_level(dict.fromkeys(nodes, b""))
    known: set[int] = set()
    for level, row in enumerate(levels[:-1]):
        known.update(given.get(level, ()))
        missing = sorted(
            index ^ 1 for index in known if index ^ 1 not in known and index ^ 1 < len(row)
        )
        proof += [row[index] for index in missing]
        known = {index >> 1 for index in known}
    return proof


def root_of(blocks: int, nodes: Mapping[Node, bytes], proof: Sequence[bytes]) -> bytes:
    """The root of a tree of `blocks` blocks that has these nodes, by a proof from `prove`.

    Raises FormatError for nodes outside the tree or above each other, and for a proof that is
    too short or too long.
    """
    given = _by_level(nodes)
    rest = iter(proof)
    known: dict[int, bytes] = {}
    level, width = 0, blocks
    while True:
        for index, digest in given.pop(level, {}).items():
            if index in known or (index + 1) << level > blocks:
                raise FormatError(RECORD, "nodes", 0, f"({level}, {index}) does not fit")
            known[index] = digest
        if width <= 1:
            break
        known = _level_up(known, width, rest)
        level, width = level + 1, (width + 1) // 2
    if given or list(known) != [0] or next(rest, None) is not None:
        raise FormatError(RECORD, "proof", 0, "does not lead to one root")
    return known[0]


def _level_up(known: Mapping[int, bytes], width: int, rest: Iterator[bytes]) -> dict[int, bytes]:
    """The parents of nodes; siblings that are not known come from the proof, in order."""
    above: dict[int, bytes] = {}
    for index in sorted(known):
        sibling = index ^ 1
        if sibling >= width:
            above[index >> 1] = known[index]
            continue
        if index & 1 and sibling in known:
            continue
        other = known.get(sibling) or next(rest, None)
        if other is None:
            raise FormatError(RECORD, "proof", 0, "is too short")
        pair = (other, known[index]) if index & 1 else (known[index], other)
        above[index >> 1] = join(*pair)
    return above


def _by_level(nodes: Mapping[Node, bytes]) -> dict[int, dict[int, bytes]]:
    found: dict[int, dict[int, bytes]] = {}
    for (level, index), digest in nodes.items():
        found.setdefault(level, {})[index] = digest
    return found
