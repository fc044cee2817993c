"""The node cache's own files: atomic, verified, cleaned."""

import errno
import os

import pytest

from imgsnap.blockstore.node_cache import STALE_S, NodeCache, cache_error
from imgsnap.digest import sha256_digest
from imgsnap.errors import AccessDenied, ImgsnapError, ResourceExhausted


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    cache = NodeCache(tmp_path)
    path = cache.root / "blobs/x"
    with pytest.raises(KeyError), cache.new_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert not path.exists()
    assert list((cache.root / "tmp").iterdir()) == []
    with cache.new_file(path) as file:
        file.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"


def test_blobs_are_hashed_when_they_are_read(tmp_path):
    cache = NodeCache(tmp_path)
    digest = sha256_digest(b"content")
    assert cache.load_blob(digest) is None
    cache.store_blob(digest, b"content")
    assert cache.load_blob(digest) == b"content"
    (cache.root / "blobs" / digest[7:]).write_bytes(b"contenT")
    assert cache.load_blob(digest) is None
    assert not (cache.root / "blobs" / digest[7:]).exists()


@pytest.mark.parametrize("size", [0, 4096, 3 << 20])
def test_metadata_and_chunk_maps_carry_a_sum(tmp_path, size):
    cache = NodeCache(tmp_path)
    region = os.urandom(size)
    digest = sha256_digest(region)
    assert cache.open_metadata(digest, size) is None
    cache.store_metadata(digest, region).close()
    file = cache.open_metadata(digest, size)
    assert file.read(size) == region
    file.close()
    assert cache.open_metadata(digest, size + 4096) is None, "another size is another region"
    cache.store_chunk_map(digest, region)
    assert cache.load_chunk_map(digest) == region
    cache.store_metadata(digest, region).close()
    for kind in ("metadata", "chunk-maps"):
        path = cache.root / kind / digest[7:]
        raw = bytearray(path.read_bytes())
        raw[-20] ^= 1
        path.write_bytes(raw)
    assert cache.open_metadata(digest, size) is None
    assert cache.load_chunk_map(digest) is None
    (cache.root / "chunk-maps" / digest[7:]).write_bytes(b"short")
    assert cache.load_chunk_map(digest) is None


def test_old_temporaries_are_removed(tmp_path):
    cache = NodeCache(tmp_path)
    old, young = cache.temporary_path(), cache.temporary_path()
    assert old != young
    old.mkdir()
    (old / "data").write_bytes(b"x")
    young.write_bytes(b"y")
    os.utime(old, (0, 0))
    assert STALE_S > 0
    assert cache.remove_stale_temporaries() == 1
    assert young.exists()
    assert not old.exists()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EROFS, AccessDenied),
        (errno.EACCES, AccessDenied),
        (errno.EIO, ImgsnapError),
    ],
)
def test_disk_errors_have_classes(number, kind):
    assert type(cache_error(OSError(number, "x"), "what")) is kind


def test_a_root_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ImgsnapError, match="cannot make the node cache"):
        NodeCache(tmp_path / "file/cache")
