"""Layers unpacked one by one, each given those beneath, and stacked by the kernel's overlayfs."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from imgsnap.digest import chain_ids, sha256_digest
from imgsnap.oci.layout import LayoutRepository
from imgsnap.snapshotter.seams import ImageLayer
from imgsnap.snapshotter.unpack_layer import Unpacker
from tests.support.image_builder import image, write_layout
from tests.support.mounts import MS_RDONLY, mounted

REPOSITORY = "registry.test/team/app"


def unpacker(layout: Path, work: Path) -> Unpacker:
    return Unpacker(lambda location: LayoutRepository(layout), work)


def layers_of(tars: Sequence[bytes], layout: Path, compression: str = "") -> list[ImageLayer]:
    """Writes an image of these layers; its layers as the snapshotter knows them."""
    made = image(*tars, compression=compression)
    write_layout(layout, made)
    kind = "application/vnd.oci.image.layer.v1.tar" + (f"+{compression}" if compression else "")
    diff_ids = [sha256_digest(tar) for tar in tars]
    return [
        ImageLayer(diff_id, sha256_digest(blob.data), len(blob.data), kind, chain_id)
        for blob, diff_id, chain_id in zip(made.layers, diff_ids, chain_ids(diff_ids), strict=True)
    ]


def unpack_stack(tars: Sequence[bytes], root: Path, compression: str = "") -> list[Path]:
    """The directories, the uppermost first."""
    layers = layers_of(tars, root / "layout", compression)
    tool = unpacker(root / "layout", root / "work")
    directories: list[Path] = []
    for number, layer in enumerate(layers):
        directory = root / f"fs{number}"
        directory.mkdir()
        tool.unpack(REPOSITORY, layer, directory, directories)
        directories.insert(0, directory)
    assert list((root / "work").iterdir()) == []
    return directories


@contextlib.contextmanager
def stacked(directories: Sequence[Path], root: Path) -> Iterator[Path]:
    """What containers see of the layers."""
    (root / "empty").mkdir()
    lowers = ":".join(map(str, [*directories, root / "empty"]))
    with mounted("overlay", root / "view", "overlay", MS_RDONLY, f"lowerdir={lowers}") as view:
        yield view


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
