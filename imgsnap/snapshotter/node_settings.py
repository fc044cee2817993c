"""What the snapshotter was told about its node: places, registries, and how snapshots are read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.blockstore.read_options import ReadOptions
from imgsnap.digest import Digest
from imgsnap.node.request import AttachRequest
from imgsnap.node.source import Source
from imgsnap.node.targets import MountOptions
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository


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
    policy: Path | None = None  # a file: whose signatures snapshots need
    read: ReadOptions = field(default_factory=ReadOptions)
    trust: tuple[str, ...] = ()  # patterns of repositories; see `matches`
    convert: tuple[str, ...] = ()  # the same: whose images are converted on first use
    one_file: bool = False  # as MountOptions.one_file

    def open(self, location: RegistryLocation) -> Repository:
        """The caller closes it. Raises what `open_repository` raises."""
        repository, _ = open_repository(
            location, self.registry, store=self.store, environ=self.environ
        )
        return repository

    def mount_options(self, repository: str, snapshot: Digest, target: Path) -> MountOptions:
        source = Source(
            f"docker://{repository}@{snapshot}",
            self.store,
            self.registry,
            Source.kept_environ(self.environ),
        )
        return MountOptions(
            AttachRequest(source, snapshot, read=self.read),
            target,
            self.run_dir,
            self.cache_dir,
            cache_quota=self.cache_quota,
            one_file=self.one_file,
        )
