"""An image as a pull without layers needs it: its documents, and what containerd is told of them.

Labels as containerd's own pull sets them: pkg/snapshotters/annotations.go, core/images/handlers.go
(ChildGCLabels), and core/unpack (``gc.ref.snapshot``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from imgsnap.digest import Digest, chain_ids, parse_digest
from imgsnap.errors import FormatError, InvalidArgument, NotFound, Unsupported
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document, parse_json_object
from imgsnap.oci.platforms import host_platform, matches
from imgsnap.oci.reference import DEFAULT_TAG, RegistryLocation
from imgsnap.oci.repository import Descriptor, Platform, RawManifest, Repository
from imgsnap.snapshotter import labels
from imgsnap.units import MIB

CONFIG_BYTES_MAX = 8 * MIB
LAYERS_MAX = 500
"""overlayfs itself stops at 500 lower directories."""
GC_SNAPSHOT = "containerd.io/gc.ref.snapshot."
GC_CONTENT = "containerd.io/gc.ref.content."
_SOURCE = "containerd.io/distribution.source."


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be written into containerd's content store."""

    digest: Digest
    data: bytes
    labels: dict[str, str]


@dataclass(frozen=True, slots=True)
class PulledImage:
    """One platform's image, verified. `name` is what containerd calls it."""

    name: str
    location: RegistryLocation
    index: RawManifest | None
    raw: RawManifest
    manifest: ImageManifest
    config: bytes
    chain: tuple[Digest, ...]  # chainIDs, bottom first

    @property
    def target(self) -> Descriptor:
        """What the name stands for: the index, if there is one."""
        return (self.index or self.raw).descriptor

    def layer_labels(self, number: int) -> dict[str, str]:
        """Of the Prepare of a layer: which image this is, and the layer's own annotations.

        Raises LimitExceeded for annotations that containerd would refuse.
        """
        layer = self.manifest.layers[number]
        own = {k: v for k, v in layer.annotations.items() if k.startswith(labels.PREFIX)}
        room = labels.LABEL_BYTES_MAX - len(labels.IMAGE_LAYERS)
        above = [entry.digest for entry in self.manifest.layers[number:]]
        return labels.check_labels(
            {
                **own,
                labels.TARGET: self.chain[number],
                labels.IMAGE_REF: self.name,
                labels.MANIFEST_DIGEST: self.raw.descriptor.digest,
                labels.LAYER_DIGEST: layer.digest,
                labels.IMAGE_LAYERS: _joined(above, room),
            }
        )

    def contents(self, snapshotter: str) -> Iterator[Content]:
        """In the order of writing: what is referred to first, for the garbage collector's sake."""
        source = {_SOURCE + self.location.registry: self.location.repository}
        top = {GC_SNAPSHOT + snapshotter: self.chain[-1]}
        yield Content(self.manifest.config.digest, self.config, {**top, **source})
        layers = enumerate(self.manifest.layers)
        children = {f"{GC_CONTENT}l.{number}": layer.digest for number, layer in layers}
        children[GC_CONTENT + "config"] = self.manifest.config.digest
        yield Content(self.raw.descriptor.digest, self.raw.raw, {**children, **source})
        if self.index is not None:
            child = {GC_CONTENT + "m.0": self.raw.descriptor.digest}
            yield Content(self.index.descriptor.digest, self.index.raw, {**child, **source})


def read_image(
    repository: Repository, location: RegistryLocation, platform: Platform | None = None
) -> PulledImage:
    """The image at a location, for a platform or this machine's.

    Raises NotFound for a platform that it lacks, InvalidArgument for what is no image.
    """
    top = repository.manifest(location.reference)
    document = parse_document(top.raw, media_type=top.descriptor.media_type)
    raw = top
    if isinstance(document, ImageIndex):
        entry = _choose(document, platform or host_platform(), repository.name)
        raw = repository.manifest(entry.digest)
        document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        raise Unsupported(f"{repository.name}: an index inside an index")
    if document.config.media_type not in media_types.IMAGE_CONFIGS:
        raise InvalidArgument(
            f"{location} is no image: its config is {document.config.media_type!r}",
            hint="name the image; its snapshot is found by it",
        )
    config = repository.blob(document.config, size_max=CONFIG_BYTES_MAX)
    chain = chain_ids(_diff_ids(config))
    if len(chain) != len(document.layers) or not 0 < len(chain) <= LAYERS_MAX:
        problem = f"{len(chain)} diffIDs for {len(document.layers)} layers, {LAYERS_MAX} at most"
        raise FormatError("image config", "rootfs.diff_ids", 0, problem)
    index = None if raw is top else top
    return PulledImage(image_name(location), location, index, raw, document, config, tuple(chain))


def image_name(location: RegistryLocation) -> str:
    """As containerd's clients write it: a tag unless there is a digest."""
    tagged = location.tag or location.digest
    return str(location) if tagged else f"{location}:{DEFAULT_TAG}"


def _choose(index: ImageIndex, wanted: Platform, where: str) -> Descriptor:
    for entry in index.manifests:
        if entry.platform is not None and matches(entry.platform, wanted):
            return entry
    offered = ", ".join(str(entry.platform) for entry in index.manifests if entry.platform)
    raise NotFound(
        f"{where}: the index has no image for {wanted}",
        hint=f"it has: {offered or 'none'}; choose one with --platform",
    )


def _diff_ids(config: bytes) -> list[Digest]:
    rootfs = parse_json_object(config, record="image config").get("rootfs")
    values = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(values, list):
        raise FormatError("image config", "rootfs.diff_ids", 0, "is not a list")
    try:
        return [parse_digest(value) for value in values]
    except InvalidArgument as error:
        raise FormatError("image config", "rootfs.diff_ids", 0, str(error)) from error


def _joined(digests: list[Digest], room: int) -> str:
    """As many as fit into a label, as containerd does it."""
    size = len(digests[0]) + 1
    return ",".join(digests[: (room + 1) // size])
