"""The snapshotter's real parts: registries, and the node daemon that shows snapshots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.digest import Digest
from imgsnap.node.source import Source
from imgsnap.node.targets import MountOptions
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.devices import NodeDevices
from imgsnap.snapshotter.find_image import Finder
from imgsnap.snapshotter.image_labels import repository_name
from imgsnap.snapshotter.unpack_layer import Unpacker


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """Where things are on this node, and how registries are reached."""

    root: Path  # the snapshotter's own directory
    run_dir: Path
    cache_dir: Path
    store: Path
    registry: RegistryOptions
    environ: Mapping[str, str]
    cache_quota: int | None = None  # bytes; None: the one kept with the cache
    read: ReadOptions = field(default_factory=ReadOptions)
    trust: tuple[str, ...] = ()  # patterns of repositories; see `trusted`

    def open(self, location: RegistryLocation) -> Repository:
        """The caller closes it. Raises what `open_repository` raises."""
        repository, _ = open_repository(
            location, self.registry, store=self.store, environ=self.environ
        )
        return repository

    def source(self, repository: str, snapshot: Digest) -> Source:
        return Source(
            f"docker://{repository}@{snapshot}",
            self.store,
            self.registry,
            Source.kept_environ(self.environ),
        )


def finder(settings: NodeSettings) -> Finder:
    """Finds by labels, catalogue and registry. Raises what opening the node cache raises."""
    return Finder(
        settings.open,
        lambda location: trusted(settings.trust, location),
        Catalogue(settings.root),
        NodeCache(settings.cache_dir, quota=settings.cache_quota),
    )


def devices(settings: NodeSettings) -> NodeDevices:
    options = MountOptions(
        reference="",
        target=settings.root,
        run_dir=settings.run_dir,
        cache_dir=settings.cache_dir,
        read=settings.read,
        cache_quota=settings.cache_quota,
    )
    return NodeDevices(settings.root, options, settings.source)


def unpacker(settings: NodeSettings) -> Unpacker:
    return Unpacker(settings.open, settings.root / "unpacking")


def trusted(patterns: Sequence[str], location: RegistryLocation) -> bool:
    """Whether a pattern as the shell's matches ``registry/repository``; ``*`` takes slashes too."""
    return any(fnmatchcase(repository_name(location), pattern) for pattern in patterns)
