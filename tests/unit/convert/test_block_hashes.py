"""Block hashes from a layer artefact: taken as they are stated, or not at all."""

import hashlib
import io
from contextlib import closing
from pathlib import Path

import pytest

from imgsnap.convert.artifact import LayerArtifact
from imgsnap.convert.block_hashes import BlockHashes
from imgsnap.convert.progress import Silent
from imgsnap.digest import Digest
from imgsnap.errors import IntegrityError, ResourceExhausted
from imgsnap.formats.chunk_map import ChunkMap
from imgsnap.formats.layer_index import LayerIndex
from imgsnap.formats.rules import Rules
from imgsnap.oci import media_types
from imgsnap.oci.repository import Descriptor

DIFF_ID = Digest("sha256:" + "ab" * 32)
BLOCKS = 3
HASHES = bytes(range(32 * BLOCKS))


class Place:
    """A repository with one blob, whatever is asked for."""

    name = "place"

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def open_blob(self, descriptor: Descriptor):
        return closing(io.BytesIO(self._blob))


def artifact(stated: bytes) -> LayerArtifact:
    digest = Digest("sha256:" + hashlib.sha256(stated).hexdigest())
    descriptor = Descriptor(media_types.BLOCK_HASHES, digest, 32 * BLOCKS)
    index = LayerIndex(DIFF_ID, Rules())
    index.extent_blocks = BLOCKS
    return LayerArtifact(index, ChunkMap((), ()), descriptor)


def obtained(directory: Path, sent: bytes, stated: bytes) -> bytes:
    hashes = BlockHashes(directory)
    hashes.obtain(Place(sent), [artifact(stated)], Silent())
    return hashes.path(DIFF_ID).read_bytes()


def test_what_the_artefact_states_is_taken(tmp_path: Path) -> None:
    assert obtained(tmp_path, HASHES, HASHES) == HASHES


SHORT, LONG = HASHES[:-1], HASHES + bytes(32)


@pytest.mark.parametrize(
    ("sent", "stated"),
    [
        (HASHES[:-1] + b"!", HASHES),
        *((sent, HASHES) for sent in (SHORT, LONG, b"")),
        *((sent, sent) for sent in (SHORT, LONG, b"")),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, sent: bytes, stated: bytes) -> None:
    """Also when the digest is that of what was sent, and only the size is a lie."""
    with pytest.raises(IntegrityError, match="sha256:"):
        obtained(tmp_path, sent, stated)


def test_a_directory_that_cannot_be_written_is_a_user_s_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match="block hashes"):
        obtained(tmp_path / "absent", HASHES, HASHES)
    with (
        pytest.raises(ResourceExhausted),
        BlockHashes(tmp_path / "absent").taking(DIFF_ID),
    ):
        pass
