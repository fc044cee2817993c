"""The source image: which manifest is meant, its config, its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from imgsnap.convert.ingest import LayerSource
from imgsnap.convert.limits import Limits
from imgsnap.digest import Digest, chain_ids, parse_digest
from imgsnap.errors import FormatError, InvalidArgument, NotFound, Unsupported
from imgsnap.formats.stub_layer import ANNOTATION
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document, parse_json_object
from imgsnap.oci.platforms import host_platform, matches
from imgsnap.oci.repository import Descriptor, Platform, RawManifest, Repository
from imgsnap.units import MIB

IMAGE_CONFIG_SIZE_MAX = 8 * MIB
CONFIG = "image config"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One platform's image."""

    manifest: RawManifest
    config: Descriptor
    config_raw: bytes
    platform: Platform
    layers: tuple[LayerSource, ...]

    @property
    def chain_ids(self) -> list[Digest]:
        """Of each layer, bottom first."""
        return chain_ids(layer.diff_id for layer in self.layers)


def select_images(
    repository: Repository,
    reference: str,
    platforms: Sequence[Platform],
    limits: Limits,
    *,
    every: bool = False,
) -> list[SourceImage]:
    """The images that `reference` and `platforms` name; all of an index's when `every`.

    Without platforms: the only image there is, or this machine's. Raises NotFound for a platform
    that the index lacks, naming those it has.
    """
    top = repository.manifest(reference)
    document = parse_document(top.raw, media_type=top.descriptor.media_type)
    if isinstance(document, ImageManifest):
        image = _read_image(repository, top, document, limits)
        for wanted in platforms:
            if not matches(image.platform, wanted):
                raise NotFound(
                    f"{repository.name}: the image is for {image.platform}, not {wanted}"
                )
        return [image]
    entries = [entry for entry in document.manifests if _is_image(entry)]
    if every:
        chosen = entries
    else:
        chosen = [_choose(repository, entries, wanted) for wanted in platforms or _default(entries)]
    if not chosen:
        raise NotFound(f"{repository.name}: the index lists no image")
    return [_read_entry(repository, entry, limits) for entry in chosen]


def _is_image(entry: Descriptor) -> bool:
    """Attestations sit in indexes as images of an unknown platform."""
    return entry.platform is None or entry.platform.architecture != "unknown"


def _default(entries: Sequence[Descriptor]) -> list[Platform]:
    only = entries[0].platform if len(entries) == 1 else None
    return [only or host_platform()]


def _choose(repository: Repository, entries: Sequence[Descriptor], wanted: Platform) -> Descriptor:
    for entry in entries:
        if entry.platform is not None and matches(entry.platform, wanted):
            return entry
    if len(entries) == 1 and entries[0].platform is None:
        return entries[0]
    offered = ", ".join(str(entry.platform) for entry in entries if entry.platform) or "none"
    raise NotFound(
        f"{repository.name}: the index has no image for {wanted}",
        hint=f"it has: {offered}; choose one with --platform, or --all-platforms",
    )


def _read_entry(repository: Repository, entry: Descriptor, limits: Limits) -> SourceImage:
    raw = repository.manifest(entry.digest)
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        raise Unsupported(f"{repository.name}: an index inside an index")
    return _read_image(repository, raw, document, limits)


def _read_image(
    repository: Repository, raw: RawManifest, manifest: ImageManifest, limits: Limits
) -> SourceImage:
    if manifest.artifact_type == media_types.ARTIFACT_SNAPSHOT:
        raise InvalidArgument(
            f"{repository.name}: is a snapshot already", hint="name the image it was made from"
        )
    if any(ANNOTATION in layer.annotations for layer in manifest.layers):
        raise InvalidArgument(
            f"{repository.name}: is a converted image already",
            hint="name the image it was made from",
        )
    if manifest.config.media_type not in media_types.IMAGE_CONFIGS:
        raise InvalidArgument(
            f"{repository.name}: is no image: its config is {manifest.config.media_type!r}"
        )
    limits.check("layers", len(manifest.layers), where=repository.name)
    config = repository.blob(manifest.config, size_max=IMAGE_CONFIG_SIZE_MAX)
    value = parse_json_object(config, record=CONFIG)
    diff_ids = _diff_ids(value)
    if len(diff_ids) != len(manifest.layers):
        raise FormatError(
            CONFIG,
            "rootfs.diff_ids",
            0,
            f"{len(diff_ids)} diffIDs for {len(manifest.layers)} layers",
        )
    layers = (LayerSource(*pair) for pair in zip(manifest.layers, diff_ids, strict=True))
    return SourceImage(raw, manifest.config, config, _platform(value), tuple(layers))


def _diff_ids(config: dict[str, Any]) -> list[Digest]:
    rootfs = config.get("rootfs")
    values = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not isinstance(values, list):
        raise FormatError(CONFIG, "rootfs.diff_ids", 0, "is not a list")
    try:
        return [parse_digest(value) for value in values]
    except InvalidArgument as error:
        raise FormatError(CONFIG, "rootfs.diff_ids", 0, str(error)) from error


def _platform(config: dict[str, Any]) -> Platform:
    texts = [config.get(name) or "" for name in ("os", "architecture", "variant")]
    for name, text in zip(("os", "architecture", "variant"), texts, strict=True):
        if not isinstance(text, str) or len(text) > 64:
            raise FormatError(CONFIG, name, 0, "is not a short string")
    return Platform(texts[0] or "linux", texts[1], texts[2])
