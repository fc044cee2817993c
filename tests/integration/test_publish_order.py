"""Layers are stored side by side, but nothing is named before it is there."""

import threading
from contextlib import closing
from pathlib import Path

import pytest

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.limits import Limits
from imgsnap.convert.pipeline import Options
from imgsnap.convert.progress import Silent
from imgsnap.convert.publish import publish
from imgsnap.convert.source import select_images
from imgsnap.errors import Unsupported
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.manifest import ImageManifest, parse_document
from tests.support.image_builder import image, write_layout
from tests.support.tars import Item, layer_tar


class SlowTarget(LayoutRepository):
    """Holds the first pack back until the other layers have had every chance to overtake it, and
    checks each manifest as a registry does: it may only name blobs that are there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, create=True)
        self._first = threading.Event()
        self.missing: list[str] = []

    def put_blob(self, descriptor, path):
        if not self._first.is_set():
            self._first.set()
            threading.Event().wait(0.5)
        super().put_blob(descriptor, path)

    def put_manifest(self, manifest, tags=(), *, subject=None):
        document = parse_document(manifest.raw)
        if isinstance(document, ImageManifest):
            blobs = (document.config, *document.layers)
            self.missing += [blob.digest for blob in blobs if not self.has_blob(blob)]
        super().put_manifest(manifest, tags, subject=subject)


def test_an_artefact_waits_for_the_packs_it_shares(tmp_path: Path) -> None:
    shared = bytes(range(256)) * 4000
    tars = [
        layer_tar([Item(b"a", content=shared), Item(b"b", content=b"b" * 9000)]),
        layer_tar([Item(b"c", content=shared)]),
        layer_tar([Item(b"d", content=shared), Item(b"e", content=b"e" * 5000)]),
    ]
    write_layout(tmp_path / "source", image(*tars))
    target = SlowTarget(tmp_path / "target")
    with (
        closing(LayoutRepository(tmp_path / "source")) as source,
        closing(target),
        ChunkIndex(tmp_path / "index") as index,
    ):
        images = select_images(source, "latest", [], Limits())
        options = Options(work_dir=tmp_path / "work", jobs=2)
        result = publish(source, images, target, "snap", index, options, Silent())
    assert target.missing == []
    reports = {layer.diff_id: layer for layer in result.images[0].layers}
    assert sum(layer.new_chunks for layer in reports.values()) < sum(
        layer.chunks for layer in reports.values()
    )


@pytest.mark.parametrize(
    "limit",
    [
        "imgsnap.oci.manifest.LAYERS_MAX",
        "imgsnap.formats.snapshot_config.METADATA_BLOCKS_MAX",
        "imgsnap.formats.chunk_map_codec.CHUNKS_MAX",
    ],
)
def test_what_readers_would_refuse_is_not_published(
    limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limits are far above what a test can make: here they are as low as can be."""
    write_layout(tmp_path / "source", image(layer_tar([Item(b"a", content=b"a" * 9000)])))
    with (
        closing(LayoutRepository(tmp_path / "source")) as source,
        closing(LayoutRepository(tmp_path / "target", create=True)) as target,
        ChunkIndex(tmp_path / "index") as index,
    ):
        images = select_images(source, "latest", [], Limits())
        options = Options(work_dir=tmp_path / "work", jobs=2)
        monkeypatch.setattr(limit, 3 if limit.endswith("LAYERS_MAX") else 0)
        with pytest.raises(Unsupported, match="too large for one snapshot"):
            publish(source, images, target, "snap", index, options, Silent())
        monkeypatch.undo()
        assert "snap" not in target.tags()
        publish(source, images, target, "snap", index, options, Silent())
        assert "snap" in target.tags()
