"""The block tree against a naive model, and its proofs against all kinds of subsets."""

import itertools

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.errors import FormatError
from imgsnap.formats import block_tree
from imgsnap.units import BLOCK_SIZE


def naive(hashes: list[bytes]) -> bytes:
    """The root by the largest power of two below the count: RFC 9162's definition."""
    if len(hashes) == 1:
        return hashes[0]
    half = 1 << (len(hashes) - 1).bit_length() - 1
    return blake3(naive(hashes[:half]) + naive(hashes[half:])).digest()


def device(blocks: int) -> bytes:
    return b"".join(number.to_bytes(4, "little") * (BLOCK_SIZE // 4) for number in range(blocks))


@given(st.integers(1, 70), st.integers(1, 9))
def test_the_root(blocks: int, step: int) -> None:
    data = device(blocks)
    leaves = block_tree.leaves(data)
    assert leaves[-1] == blake3(data[-BLOCK_SIZE:]).digest()
    assert block_tree.build(leaves)[-1] == [naive(leaves)]
    hasher = block_tree.TreeHasher()
    for at in range(0, len(data), step * BLOCK_SIZE):
        hasher.update(data[at : at + step * BLOCK_SIZE])
    assert hasher.root == naive(leaves)


def test_no_blocks() -> None:
    assert block_tree.TreeHasher().root == block_tree.EMPTY_ROOT


@given(st.integers(0, 5000), st.integers(1, 5000))
def test_cover_is_exact(first: int, count: int) -> None:
    at = first
    for level, index in block_tree.cover(first, count):
        assert index << level == at
        at += 1 << level
    assert at == first + count


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A tree's size and disjoint runs of its blocks, some of which touch."""
    blocks = draw(st.integers(1, 90))
    cuts = sorted(draw(st.sets(st.integers(0, blocks), min_size=2, max_size=12)))
    pairs = list(itertools.pairwise(cuts))
    kept = draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True)) if pairs else []
    return blocks, [(first, end - first) for first, end in kept or [(0, blocks)]]


def nodes_of(leaves: list[bytes], found: list[tuple[int, int]]) -> dict[block_tree.Node, bytes]:
    nodes: dict[block_tree.Node, bytes] = {}
    for first, count in found:
        hashes = block_tree.run_nodes(first, leaves[first : first + count])
        nodes.update(zip(block_tree.cover(first, count), hashes, strict=True))
    return nodes


@given(runs(), st.data())
def test_a_proof_leads_to_the_root_and_nothing_else_does(
    sample: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    blocks, found = sample
    leaves = block_tree.leaves(device(blocks))
    levels = block_tree.build(leaves)
    nodes = nodes_of(leaves, found)
    proof = block_tree.prove(levels, nodes)
    assert block_tree.root_of(blocks, nodes, proof) == levels[-1][0]
    victim = data.draw(st.sampled_from(sorted(nodes)))
    wrong = nodes | {victim: bytes(32)}
    assert block_tree.root_of(blocks, wrong, proof) != levels[-1][0]
    with pytest.raises(FormatError):
        block_tree.root_of(blocks, nodes, [*proof, bytes(32)])
    if proof:
        with pytest.raises(FormatError):
            block_tree.root_of(blocks, nodes, proof[:-1])
        flipped = [*proof[:-1], bytes(32)]
        assert block_tree.root_of(blocks, nodes, flipped) != levels[-1][0]


@given(
    st.integers(0, 40),
    st.dictionaries(
        st.tuples(st.integers(0, 8), st.integers(0, 50)), st.just(b"x" * 32), max_size=8
    ),
    st.integers(0, 8),
)
def test_nodes_that_do_not_fit_are_refused(
    blocks: int, nodes: dict[block_tree.Node, bytes], siblings: int
) -> None:
    try:
        block_tree.root_of(blocks, nodes, [bytes(32)] * siblings)
    except FormatError:
        return
    covered = [
        block for level, index in nodes for block in range(index << level, (index + 1) << level)
    ]
    assert covered and len(covered) == len(set(covered)) and max(covered) < blocks
