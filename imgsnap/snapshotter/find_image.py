"""Which snapshot an image has: see docs/snapshotter.md, "How the snapshot of an image is found"."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest
from imgsnap.errors import AccessDenied, ImgsnapError, IntegrityError, InvalidArgument, Unavailable
from imgsnap.formats.stub_layer import MEDIA_TYPE, stub_layer
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.image_labels import (
    ImageLabels,
    parse_image_labels,
    registry_location,
    repository_name,
)
from imgsnap.snapshotter.negative_cache import NegativeCache
from imgsnap.snapshotter.registry_search import search
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot
from imgsnap.snapshotter.single_flight import SingleFlight

FLIGHTS_MAX = 32
"""Images that are looked for at a time; more would be registries that do not answer."""

OpenRepository = Callable[[RegistryLocation], Repository]
"""Opens a registry's repository, with hosts.toml and credentials; the finder closes it. What it
waits for must have timeouts: a look-up that is given up ends by them."""
Trusts = Callable[[RegistryLocation], bool]
"""Whether snapshots that a repository offers for its images are believed to hold what the images
hold. containerd shares layers by chainID: a false snapshot, once claimed, is what every image with
these layers gets on this node, from whatever registry it comes."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """Times in seconds."""

    look_up_s: float = 5.0  # of one look-up; then the image is pulled as any other
    none_ttl_s: float = 300.0  # until an image without a snapshot is looked for again
    unavailable_ttl_s: float = 10.0  # the same when the registry did not tell
    negatives_max: int = 4096


class Finder:
    """Finds snapshots by labels; the implementation of `ImageFinder`. Thread safe."""

    def __init__(
        self,
        open_repository: OpenRepository,
        trusts: Trusts,
        catalogue: Catalogue,
        cache: NodeCache,
        limits: SearchLimits = SearchLimits(),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_repository = open_repository
        self._trusts = trusts
        self._catalogue = catalogue
        self._cache = cache
        self._limits = limits
        self._nothing = NegativeCache(limits.negatives_max, clock=clock)
        self._flights: SingleFlight[ImageSnapshot | None] = SingleFlight(
            FLIGHTS_MAX, limits.look_up_s
        )

    def find(self, labels: Mapping[str, str]) -> ImageSnapshot | None:
        """See `ImageFinder.find`. Takes at most the limit of a look-up."""
        try:
            asked = parse_image_labels(labels)
            if asked.snapshot is not None:
                return self._of_stub(asked, asked.snapshot)
            if asked.image is None or asked.manifest is None:
                return None
            found = self._of_image(asked.image, asked.manifest)
            if found is not None:
                _check_layer(asked, found)
            return found
        except ImgsnapError as error:
            _log.warning("pulled as any other image: %s", error)
        except Exception:
            _log.exception("pulled as any other image")
        return None

    def remember(self, image: RegistryLocation, manifest: Digest, found: ImageSnapshot) -> None:
        """An image's snapshot is known from elsewhere: it was converted or pulled here.

        Raises OSError.
        """
        self._catalogue.store(repository_name(image), manifest, found)
        self._nothing.forget((repository_name(image), manifest))

    def opened(self, image: ImageSnapshot) -> None:
        """See `ImageFinder.opened`. Clients that send no image reference get the snapshot from
        this repository from now on."""
        try:
            self._catalogue.store_place(image)
        except OSError as error:
            _log.warning("the catalogue cannot be written: %s", error)

    def gone(self, labels: Mapping[str, str]) -> None:
        """See `ImageFinder.gone`. A newer snapshot is found once the negative answer is old."""
        try:
            asked = parse_image_labels(labels)
        except ImgsnapError:
            return
        if asked.image is not None and asked.manifest is not None:
            key = repository_name(asked.image), asked.manifest
            self._catalogue.forget(*key)
            self._nothing.add(key, self._limits.none_ttl_s)

    def _of_stub(self, asked: ImageLabels, snapshot: Digest) -> ImageSnapshot:
        """Of a converted image: asks nobody, because the stub is a function of the digest.

        Its registry layer may have been compressed anew on the way, so the diffID decides.
        """
        stub = stub_layer(snapshot)
        if asked.target != stub.diff_id:
            raise IntegrityError(
                f"layer {asked.target} claims the snapshot {snapshot}, but is not its stub"
            )
        layer = ImageLayer(stub.diff_id, stub.digest, len(stub.blob), MEDIA_TYPE, stub.diff_id)
        if asked.image is not None:
            return ImageSnapshot(repository_name(asked.image), snapshot, (layer,))
        repository = self._catalogue.place_of(snapshot)
        if repository is None:
            raise InvalidArgument(
                f"a converted image of snapshot {snapshot}, but the client does not say of which "
                "repository",
                hint="turn its snapshot annotations on, or `imgsnap pull` the image first",
            )
        return ImageSnapshot(repository, snapshot, (layer,))

    def _of_image(self, image: RegistryLocation, manifest: Digest) -> ImageSnapshot | None:
        key = repository_name(image), manifest
        found = self._catalogue.load(*key)
        if found is not None:
            return found if self._trusts(registry_location(found.repository)) else None
        if key in self._nothing or not self._trusts(image):
            return None
        try:
            return self._flights.run(key, lambda: self._look_up(image, manifest))
        except Unavailable:
            # Also when time was up: the layers that follow do not wait once more.
            self._nothing.add(key, self._limits.unavailable_ttl_s)
            raise

    def _look_up(self, image: RegistryLocation, manifest: Digest) -> ImageSnapshot | None:
        """Asks the registry, and records what it says: the last asker may have gone."""
        name = repository_name(image)
        try:
            with closing(self._open_repository(image)) as repository:
                found = search(repository, image, manifest, self._cache)
        except (Unavailable, AccessDenied):
            self._nothing.add((name, manifest), self._limits.unavailable_ttl_s)
            raise
        except ImgsnapError:
            self._nothing.add((name, manifest), self._limits.none_ttl_s)
            raise
        if found is None:
            self._nothing.add((name, manifest), self._limits.none_ttl_s)
            return None
        try:
            self._catalogue.store(name, manifest, found)
        except OSError as error:  # a full disk costs look-ups only
            _log.warning("the catalogue cannot be written: %s", error)
        self._nothing.forget((name, manifest))
        return found


def _check_layer(asked: ImageLabels, found: ImageSnapshot) -> None:
    """The layer that is prepared is one of the image's. Raises IntegrityError."""
    for layer in found.layers:
        if asked.target in (None, layer.chain_id) and asked.layer in (None, layer.digest):
            return
    raise IntegrityError(f"the image has no layer {asked.layer} with chainID {asked.target}")
