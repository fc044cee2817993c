"""Small real forms of the snapshotter's seams: images in a table, a directory as a device, layers
as trees of one file."""

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import Busy, ImgsnapError, NotFound, Unavailable
from imgsnap.snapshotter.labels import MANIFEST_DIGEST, TARGET
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot

REPOSITORY = "registry.example/app"


def image_of(*names: str, repository: str = REPOSITORY) -> ImageSnapshot:
    """An image whose layers are these; equal names beneath make equal chainIDs."""
    layers: list[ImageLayer] = []
    for name in names:
        diff_id = sha256_digest(name.encode())
        chain = diff_id
        if layers:
            chain = sha256_digest(f"{layers[-1].chain_id} {diff_id}".encode())
        blob = sha256_digest(b"blob " + name.encode())
        layers.append(ImageLayer(diff_id, blob, len(name), "application/x-layer", chain))
    digest = sha256_digest("\n".join([repository, *names]).encode())
    return ImageSnapshot(repository, digest, tuple(layers))


def labels_of(image: ImageSnapshot, index: int) -> dict[str, str]:
    """What CRI says when it prepares a layer of the image."""
    return {
        TARGET: image.layers[index].chain_id,
        MANIFEST_DIGEST: image.digest,
        "containerd.io/gc.root": "kept",
    }


@dataclass
class Images:
    """An ImageFinder."""

    images: list[ImageSnapshot]
    seen: list[Digest] = field(default_factory=list)  # opened
    lost: list[str] = field(default_factory=list)  # chainIDs of layers whose image was gone

    def opened(self, image: ImageSnapshot) -> None:
        self.seen.append(image.digest)

    def gone(self, labels: Mapping[str, str]) -> None:
        self.lost.append(labels[TARGET])

    def find(self, labels: Mapping[str, str]) -> ImageSnapshot | None:
        wanted = labels.get(MANIFEST_DIGEST)
        return next((image for image in self.images if image.digest == wanted), None)


@dataclass
class DirectoryDevices:
    """Devices below `root`: shown ones are directories with a file `device`."""

    root: Path
    missing: set[Digest] = field(default_factory=set)
    deleted: set[Digest] = field(default_factory=set)
    busy: set[Digest] = field(default_factory=set)
    split: set[Digest] = field(default_factory=set)  # not in one file
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _path(self, snapshot: Digest) -> Path:
        return self.root / snapshot[7:]

    def show(self, repository: str, snapshot: Digest) -> Path:
        if snapshot in self.missing:
            raise Unavailable(f"{repository} does not answer")
        if snapshot in self.deleted:
            raise NotFound(f"{repository} has no {snapshot}")
        path = self._path(snapshot)
        with self._lock:  # a row that is being removed may be shown and released at once
            path.mkdir(parents=True, exist_ok=True)
            (path / "device").write_text(snapshot)
        return path

    def file(self, repository: str, snapshot: Digest) -> Path | None:
        return None if snapshot in self.split else self.show(repository, snapshot) / "device"

    def release(self, snapshot: Digest) -> None:
        if snapshot in self.busy:
            raise Busy("open files")
        with self._lock:
            (self._path(snapshot) / "device").unlink(missing_ok=True)
            self._path(snapshot).rmdir()

    def shown(self) -> Iterable[Digest]:
        if self.root.exists():
            for path in self.root.iterdir():
                yield Digest(f"sha256:{path.name}")


@dataclass
class OneFileLayers:
    """A LayerUnpacker: every layer is a file with the name of its diffID."""

    unpacked: list[Digest] = field(default_factory=list)
    fails: ImgsnapError | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def unpack(self, repository: str, layer: ImageLayer, directory: Path, lowers) -> None:
        assert not list(directory.iterdir())
        (directory / "half").write_text("not yet")
        if self.fails is not None:
            raise self.fails
        (directory / "half").unlink()
        (directory / layer_file(layer)).write_text(repository)
        with self._lock:
            self.unpacked.append(layer.digest)


def layer_file(layer: ImageLayer) -> str:
    return hashlib.sha256(layer.diff_id.encode()).hexdigest()[:12]
