"""Images with snapshots in a layout that stands for a registry's repository."""

import threading
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.limits import Limits
from imgsnap.convert.pipeline import Options
from imgsnap.convert.progress import Silent
from imgsnap.convert.publish import publish
from imgsnap.convert.source import SourceImage, select_images
from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import Unavailable
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.published import Form
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import RawManifest
from imgsnap.snapshotter import labels as names
from tests.support.image_builder import Image, image, write_layout


@dataclass
class Place:
    """A layout opened as a registry's repository would be; can be away, and can hang."""

    root: Path
    opened: list[RegistryLocation] = field(default_factory=list)
    away: bool = False
    answers: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.answers.set()
        LayoutRepository(self.layout, create=True).close()

    @property
    def layout(self) -> Path:
        return self.root / "layout"

    def open(self, location: RegistryLocation) -> LayoutRepository:
        self.opened.append(location)
        self.answers.wait(60)
        if self.away:
            raise Unavailable("no answer")
        return LayoutRepository(self.layout)

    def add_image(self, *tars: bytes, tag: str = "latest", compression: str = "gzip") -> Image:
        made = image(*tars, compression=compression)
        write_layout(self.root / "source", made, tag)
        with (
            closing(LayoutRepository(self.root / "source")) as source,
            closing(LayoutRepository(self.layout)) as target,
        ):
            from imgsnap.oci.transfer import copy_document

            copy_document(source, target, tag, tag, self.root)
        return made

    def image(self, tag: str = "latest") -> SourceImage:
        with closing(LayoutRepository(self.layout)) as layout:
            (found,) = select_images(layout, tag, [], Limits())
        return found

    def convert(self, tag: str = "latest", form: Form = Form.SNAPSHOT) -> Digest:
        """The snapshot's digest; its tag, or that of its image, is ``<tag>-snap``."""
        with (
            closing(LayoutRepository(self.layout)) as layout,
            ChunkIndex(self.root / "index") as index,
        ):
            images = select_images(layout, tag, [], Limits())
            options = Options(work_dir=self.root / "work", jobs=1)
            done = publish(
                layout, images, layout, f"{tag}-snap", index, options, Silent(), form=form
            )
            return done.images[0].snapshot.manifest.descriptor.digest

    def put(self, manifest: RawManifest, tag: str) -> None:
        with closing(LayoutRepository(self.layout)) as layout:
            layout.put_manifest(manifest, [tag])

    def remove_tag(self, tag: str) -> None:
        with closing(LayoutRepository(self.layout)) as layout:
            assert layout.remove_tag(tag)

    def delete(self, digest: Digest) -> None:
        with closing(LayoutRepository(self.layout)) as layout:
            layout.delete_manifests({digest})


def labels_of(
    found: SourceImage, layer: int = 0, ref: str = "registry.test/team/app:latest"
) -> dict[str, str]:
    """As CRI sends them with the Prepare of one layer of an ordinary image."""
    return {
        names.TARGET: found.chain_ids[layer],
        names.IMAGE_REF: ref,
        names.MANIFEST_DIGEST: parse_digest(found.manifest.descriptor.digest),
        names.LAYER_DIGEST: found.layers[layer].descriptor.digest,
        names.IMAGE_LAYERS: ",".join(item.descriptor.digest for item in found.layers[layer:])[:200],
    }
