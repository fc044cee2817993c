"""What the snapshotter's core needs from others: who finds, who shows and who unpacks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from imgsnap.digest import Digest


@dataclass(frozen=True, slots=True)
class ImageLayer:
    """One layer of an ordinary image."""

    diff_id: Digest
    digest: Digest
    """Of the blob as the registry has it, mostly compressed."""
    size: int
    """Of that blob, in bytes."""
    media_type: str
    chain_id: Digest


@dataclass(frozen=True, slots=True)
class ImageSnapshot:
    """The snapshot of a converted image."""

    repository: str
    """ "registry.example/team/app", as RegistryLocation names it."""
    digest: Digest
    """Of the snapshot's manifest."""
    layers: tuple[ImageLayer, ...]
    """Bottom first; of the source image, or the one stub layer of a converted manifest."""


class ImageFinder(Protocol):
    """Knows which images have snapshots."""

    def find(self, labels: Mapping[str, str]) -> ImageSnapshot | None:
        """The snapshot of the image one of whose layers is prepared with these labels.

        None when there is none or it cannot be had now. Never raises for what the labels or a
        registry say: that is logged, and the fallback is used.
        """

    def opened(self, image: ImageSnapshot) -> None:
        """What `find` gave was opened and verified: it is where it was said to be."""

    def gone(self, labels: Mapping[str, str]) -> None:
        """What `find` gave for these labels is not there, or broken: not to be given again soon."""


class Devices(Protocol):
    """Mounts snapshots on this node, each once."""

    def show(self, repository: str, snapshot: Digest) -> Path:
        """The directory where the snapshot's EROFS is mounted; opens, verifies and mounts it if
        need be. Raises ImgsnapError."""

    def release(self, snapshot: Digest) -> None:
        """No row needs it any more. Raises Busy while in use: asked again at the next Cleanup."""

    def shown(self) -> Iterable[Digest]:
        """The snapshots that are mounted now."""


class LayerUnpacker(Protocol):
    """Fetches and unpacks ordinary layers."""

    def unpack(
        self, repository: str, layer: ImageLayer, directory: Path, lowers: Sequence[Path]
    ) -> None:
        """Fetches one layer, verifies its digest and its diffID, and writes its tree in overlay
        form (whiteouts, opaque directories) into an empty directory. After an error it may hold
        part of it.

        `lowers` are the directories of the layers beneath in the same form, the uppermost first:
        a directory that the layer has no entry for gets the attributes it has there, and hard
        links may lead there. Raises ImgsnapError."""
