"""The chunk rule: covers the extent, keeps its bounds, and never depends on floating point."""

import decimal
from array import array

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from imgsnap.convert.chunker import cut_threshold, plan
from imgsnap.formats.layer_index import FileColumns
from imgsnap.formats.rules import Rules
from imgsnap.units import BLOCK_SIZE, KIB, blocks_for


def columns(sizes, seed=b""):
    digests = b"".join(blake3(seed + b"%d" % n).digest() for n in range(len(sizes)))
    starts, block = array("I"), 0
    for size in sizes:
        starts.append(block)
        block += blocks_for(size)
    return FileColumns(bytearray(digests), array("Q", sizes), starts)


def test_threshold_is_exact():
    with decimal.localcontext(prec=60):
        for target in (8, 32, 256):
            for blocks in range(1, target):
                exact = (1 - (-decimal.Decimal(blocks) / target).exp()) * 2**64
                assert cut_threshold(blocks, target) == int(exact)
    # Golden values: these integers are the format. A change of any moves every cut.
    assert cut_threshold(1, 32) == 567546649590711157
    assert cut_threshold(31, 32) == 11445149761959282783


@given(st.lists(st.integers(1, 700 * KIB), max_size=60), st.binary(max_size=4))
def test_chunks_cover_the_extent_in_order(sizes, seed):
    rules = Rules()
    files = columns(sizes, seed)
    block = 0
    seen: dict[int, int] = {}
    for chunk in plan(files, rules):
        assert chunk.blocks == sum(blocks_for(piece.length) for piece in chunk.pieces)
        assert chunk.blocks * BLOCK_SIZE <= max(
            rules.chunk_max, rules.chunk_target + rules.chunk_min
        )
        for piece in chunk.pieces:
            assert piece.offset == seen.get(piece.file, 0)
            assert files.block[piece.file] + piece.offset // BLOCK_SIZE == block
            seen[piece.file] = piece.offset + piece.length
            block += blocks_for(piece.length)
    assert [seen.get(n, 0) for n in range(len(sizes))] == sizes


@given(st.integers(0, 40), st.integers(1, 100 * KIB))
def test_an_inserted_file_changes_few_chunks(where, size):
    sizes = [(n * 7919) % (90 * KIB) + 1 for n in range(60)]
    before = columns(sizes)
    position = where % len(sizes)
    sizes.insert(position, size)
    digests = bytearray(before.digest)
    digests[position * 32 : position * 32] = blake3(b"new %d" % size).digest()
    after = FileColumns(digests, array("Q", sizes), columns(sizes).block)

    def ids(files):
        return {
            tuple(bytes(files.digest[p.file * 32 : p.file * 32 + 32]) for p in chunk.pieces)
            for chunk in plan(files, Rules())
        }

    assert len(ids(after) - ids(before)) <= 8


def test_large_files_are_cut_from_their_start():
    rules = Rules()
    lengths = [c.pieces[0].length for c in plan(columns([3 * rules.chunk_target + 5]), rules)]
    assert lengths == [rules.chunk_target] * 2 + [rules.chunk_target + 5]


@pytest.mark.parametrize("bad", [{"chunk_target": 100}, {"chunk_min": 1 << 30}, {"chunk": 9}])
def test_unusable_rules_are_refused(bad):
    from imgsnap.errors import UnsupportedFormat

    with pytest.raises(UnsupportedFormat):
        Rules(**bad)
