"""A whole conversion: images in, one tagged snapshot or index of snapshots out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.dedupe import sync_chunk_index
from imgsnap.convert.image import put_image
from imgsnap.convert.pipeline import Conversion, ConvertedImage, Options
from imgsnap.convert.progress import Progress
from imgsnap.convert.snapshot import root_hash_annotation
from imgsnap.convert.source import SourceImage
from imgsnap.errors import AlreadyExists, NotFound
from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageIndex, raw_manifest
from imgsnap.oci.published import NO_PLATFORM, RULES, SOURCE, Content, Converted, Form, content_of
from imgsnap.oci.repository import (
    Descriptor,
    RawManifest,
    Repository,
    WritableRepository,
)


@dataclass(frozen=True, slots=True)
class Published:
    """What the target's tag now holds."""

    manifest: RawManifest
    images: tuple[ConvertedImage, ...]  # empty when the tag was up to date


def existing(
    target: Repository, tag: str, images: Sequence[SourceImage], options: Options, form: Form
) -> RawManifest | None:
    """The tag's manifest when it is already the snapshot of these images under these rules, with
    or without hash trees as wanted.

    Raises AlreadyExists when the tag holds something that is no snapshot at all.
    """
    raw = held_snapshot(target, tag)
    wanted = tuple(
        Converted(str(image.manifest.descriptor.digest), options.rules.text, options.verity)
        for image in images
    )
    return raw if raw is not None and content_of(raw) == Content(form, wanted) else None


def held_snapshot(target: Repository, tag: str) -> RawManifest | None:
    """The snapshot, or index of snapshots, under a tag; None when the tag is free.

    Raises AlreadyExists when the tag holds anything else: images are not overwritten.
    """
    try:
        raw = target.manifest(tag)
    except NotFound:
        return None
    if content_of(raw) is None:
        raise AlreadyExists(
            f"{target.name}: tag {tag!r} holds something that is not a snapshot",
            hint="choose another tag for the snapshot, for example "
            f"{tag}-imgsnap; the image stays as it is",
        )
    return raw


def publish(
    source: Repository,
    images: Sequence[SourceImage],
    target: WritableRepository,
    tag: str,
    index: ChunkIndex,
    options: Options,
    progress: Progress,
    *,
    form: Form = Form.SNAPSHOT,
    force: bool = False,
    reuse: Sequence[Repository] = (),
) -> Published:
    """Converts the images and tags the result; the tag is moved last.

    More than one image make an index, whatever `form` says. An up-to-date tag is left alone unless
    `force`.
    """
    if form is Form.SNAPSHOT and len(images) != 1:
        form = Form.INDEX
    if not force:
        current = existing(target, tag, images, options, form)
        if current is not None:
            return Published(current, ())
    for repository in (target, *reuse):
        sync_chunk_index(repository, index)
    with Conversion(target, index, options, progress, reuse=reuse) as conversion:
        converted = tuple(conversion.convert(source, image) for image in images)
    if form is Form.SNAPSHOT:
        manifest = converted[0].snapshot.manifest
    else:
        manifest = _index(target, images, converted, form)
    target.put_manifest(manifest, [tag])
    return Published(manifest, converted)


def _index(
    target: WritableRepository,
    images: Sequence[SourceImage],
    converted: Sequence[ConvertedImage],
    form: Form,
) -> RawManifest:
    """Images come first: clients take the first entry that fits their platform."""
    runnable: list[Descriptor] = []
    behind: list[Descriptor] = []
    for image, result in zip(images, converted, strict=True):
        snapshot = result.snapshot
        if form is Form.IMAGE:
            runnable.append(_entry(image, result, put_image(target, image, snapshot)))
            # Listed, so that registries keep it and copies of the index take it along.
            behind.append(replace(_entry(image, result, snapshot.manifest), platform=NO_PLATFORM))
        else:
            runnable.append(_entry(image, result, snapshot.manifest))
    entries = (*runnable, *behind)
    return raw_manifest(ImageIndex(entries, artifact_type=media_types.ARTIFACT_SNAPSHOT))


def _entry(image: SourceImage, result: ConvertedImage, manifest: RawManifest) -> Descriptor:
    return replace(
        manifest.descriptor,
        artifact_type="",  # skopeo drops it from entries, and so would change the digest
        platform=image.platform,
        annotations={
            SOURCE: str(image.manifest.descriptor.digest),
            RULES: result.snapshot.config.rules,
            **root_hash_annotation(result.snapshot.config),
        },
    )
