"""A conversion makes no snapshot that readers refuse for its number of extents."""

from array import array

import pytest

from imgsnap.convert.snapshot import check_extents
from imgsnap.digest import Digest
from imgsnap.errors import FormatError, Unsupported
from imgsnap.formats.chunk_map import ChunkMap, Extent
from imgsnap.formats.chunk_map_codec import decode, encode

EMPTY = Extent(
    Digest("sha256:" + "00" * 32), 0, bytes(32), b"",
    array("H"), array("H"), array("I"), array("I"),
)  # fmt: skip


@pytest.mark.parametrize(("layers", "verity"), [(1024, False), (1023, True)])
def test_as_many_extents_as_a_reader_takes(layers: int, verity: bool) -> None:
    check_extents(layers, verity=verity)
    decode(encode(ChunkMap((), (EMPTY,) * (layers + verity))))
    with pytest.raises(Unsupported, match=f"{layers + 1} layers; a snapshot can have {layers}"):
        check_extents(layers + 1, verity=verity)
    with pytest.raises(FormatError, match="extent_count"):
        decode(encode(ChunkMap((), (EMPTY,) * (layers + verity + 1))))
