"""What a conversion leaves under a tag, told from the manifest alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from imgsnap.oci import media_types
from imgsnap.oci.manifest import ImageManifest, parse_document
from imgsnap.oci.repository import Platform, RawManifest

SOURCE = "io.imgsnap.source"
"""On manifests and index entries: digest of the image manifest that the snapshot was made from."""
RULES = "io.imgsnap.rules"
"""On manifests and index entries: `Rules.text` of the conversion."""
ROOT_HASH = "io.imgsnap.verity.roothash"
"""On manifests and index entries of snapshots with a hash tree: its root hash, in hex."""
NO_PLATFORM = Platform("unknown", "unknown")
"""Of index entries that are no images to run, as BuildKit marks its attestations."""


class Form(Enum):
    """What a tag holds."""

    SNAPSHOT = "snapshot"  # a snapshot's manifest
    INDEX = "index"  # an index of snapshots, one per platform
    IMAGE = "image"  # an index of converted images, with their snapshots behind them


@dataclass(frozen=True, slots=True)
class Content:
    """A form, and what was converted."""

    form: Form
    images: tuple["Converted", ...]


class Converted(NamedTuple):
    """One image: the digest of its manifest, the rules, and whether there is a hash tree."""

    source: str
    rules: str
    verity: bool


def content_of(raw: RawManifest) -> Content | None:
    """What a manifest that a conversion tagged holds; None for anything else.

    Raises what parse_document raises.
    """
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if document.artifact_type != media_types.ARTIFACT_SNAPSHOT:
        return None
    if isinstance(document, ImageManifest):
        subject = str(document.subject.digest) if document.subject else ""
        return Content(Form.SNAPSHOT, (_converted(subject, document.annotations),))
    named = [entry for entry in document.manifests if entry.platform != NO_PLATFORM]
    form = Form.INDEX if len(named) == len(document.manifests) else Form.IMAGE
    images = [_converted(e.annotations.get(SOURCE, ""), e.annotations) for e in named]
    return Content(form, tuple(images))


def _converted(source: str, annotations: Mapping[str, str]) -> Converted:
    return Converted(source, annotations.get(RULES, ""), ROOT_HASH in annotations)
