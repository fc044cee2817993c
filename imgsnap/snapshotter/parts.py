"""The snapshotter's real parts: registries, and the node daemon that shows snapshots."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.oci.reference import RegistryLocation
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.directories import UNPACKING
from imgsnap.snapshotter.find_image import Finder
from imgsnap.snapshotter.image_labels import repository_name
from imgsnap.snapshotter.node_settings import NodeSettings
from imgsnap.snapshotter.unpack_layer import Unpacker


def finder(settings: NodeSettings) -> Finder:
    """Finds by labels, catalogue and registry. Raises what opening the node cache raises."""
    return Finder(
        settings.open,
        lambda location: matches(settings.trust, location),
        Catalogue(settings.root),
        NodeCache(settings.cache_dir, quota=settings.cache_quota),
    )


def unpacker(settings: NodeSettings) -> Unpacker:
    return Unpacker(settings.open, settings.root / UNPACKING)


def matches(patterns: Sequence[str], location: RegistryLocation) -> bool:
    """Whether a pattern as the shell's matches ``registry/repository``; ``*`` takes slashes too."""
    return any(fnmatchcase(repository_name(location), pattern) for pattern in patterns)
