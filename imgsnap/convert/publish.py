"""A whole conversion: images in, one tagged snapshot or index of snapshots out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.artifact import RULES
from imgsnap.convert.dedupe import sync_chunk_index
from imgsnap.convert.pipeline import Conversion, ConvertedImage, Options
from imgsnap.convert.progress import Progress
from imgsnap.convert.source import SourceImage
from imgsnap.errors import AlreadyExists, NotFound
from imgsnap.formats.rules import Rules
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document, raw_manifest
from imgsnap.oci.repository import Descriptor, RawManifest, Repository, WritableRepository

SOURCE = "io.imgsnap.source"
"""On an index entry: digest of the image manifest that the snapshot was made from."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the target's tag now holds."""

    manifest: RawManifest
    images: tuple[ConvertedImage, ...]  # empty when the tag was up to date


def existing(
    target: Repository, tag: str, images: Sequence[SourceImage], rules: Rules
) -> RawManifest | None:
    """The tag's manifest when it is already the snapshot of these images under these rules.

    Raises AlreadyExists when the tag holds something that is no snapshot at all.
    """
    raw = held_snapshot(target, tag)
    wanted = [(str(image.manifest.descriptor.digest), rules.text) for image in images]
    return raw if raw is not None and _sources(raw) == wanted else None


def held_snapshot(target: Repository, tag: str) -> RawManifest | None:
    """The snapshot, or index of snapshots, under a tag; None when the tag is free.

    Raises AlreadyExists when the tag holds anything else: images are not overwritten.
    """
    try:
        raw = target.manifest(tag)
    except NotFound:
        return None
    if _sources(raw) is None:
        raise AlreadyExists(
            f"{target.name}: tag {tag!r} holds something that is not a snapshot",
            hint="choose another tag for the snapshot, for example "
            f"{tag}-imgsnap; the image stays as it is",
        )
    return raw


def _sources(raw: RawManifest) -> list[tuple[str, str]] | None:
    """(source manifest digest, rules) of each snapshot; None for anything else."""
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if document.artifact_type != media_types.ARTIFACT_SNAPSHOT:
        return None
    if isinstance(document, ImageManifest):
        subject = str(document.subject.digest) if document.subject else ""
        return [(subject, document.annotations.get(RULES, ""))]
    return [
        (entry.annotations.get(SOURCE, ""), entry.annotations.get(RULES, ""))
        for entry in document.manifests
    ]


def publish(
    source: Repository,
    images: Sequence[SourceImage],
    target: WritableRepository,
    tag: str,
    index: ChunkIndex,
    options: Options,
    progress: Progress,
    *,
    as_index: bool = False,
    force: bool = False,
    reuse: Sequence[Repository] = (),
) -> Published:
    """Converts the images and tags the result; the tag is moved last.

    With `as_index`, or for more than one image, the tag holds an index. An up-to-date tag is
    left alone unless `force`.
    """
    as_index = as_index or len(images) != 1
    if not force:
        current = existing(target, tag, images, options.rules)
        if current is not None and (current.descriptor.media_type == media_types.OCI_INDEX) == (
            as_index
        ):
            return Published(current, ())
    for repository in (target, *reuse):
        sync_chunk_index(repository, index)
    with Conversion(target, index, options, progress, reuse=reuse) as conversion:
        converted = tuple(conversion.convert(source, image) for image in images)
    if as_index:
        manifest = _index(images, converted)
    else:
        manifest = converted[0].snapshot.manifest
    target.put_manifest(manifest, [tag])
    return Published(manifest, converted)


def _index(images: Sequence[SourceImage], converted: Sequence[ConvertedImage]) -> RawManifest:
    entries: list[Descriptor] = []
    for image, result in zip(images, converted, strict=True):
        snapshot = result.snapshot
        entries.append(
            replace(
                snapshot.manifest.descriptor,
                artifact_type="",  # skopeo drops it from entries, and so would change the digest
                platform=image.platform,
                annotations={
                    SOURCE: str(image.manifest.descriptor.digest),
                    RULES: snapshot.config.rules,
                },
            )
        )
    return raw_manifest(ImageIndex(tuple(entries), artifact_type=media_types.ARTIFACT_SNAPSHOT))
