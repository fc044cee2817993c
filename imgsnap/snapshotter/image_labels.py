"""What the labels of a Prepare say about the image, strictly parsed.

By client and version (containerd.io/snapshot/…):

* ``cri.image-ref``, ``cri.manifest-digest``, ``cri.layer-digest`` come from CRI when snapshot
  annotations are on, from ctr 2.1 with ``enable_remote_snapshot_annotations``, and from nerdctl for
  plugins with certain names only;
* ``imgsnap.digest`` comes from every client that unpacks while it pulls: it is an annotation of the
  manifest.

The client writes the former, the image's author the latter. Neither is believed: digests are
parsed, an image reference can name a registry and nothing else.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from imgsnap.digest import Digest
from imgsnap.errors import InvalidArgument, InvalidReference, LimitExceeded
from imgsnap.oci.reference import RegistryLocation, parse_location
from imgsnap.snapshotter import labels as names


@dataclass(frozen=True, slots=True)
class ImageLabels:
    """The image of one layer; None for what was not said."""

    target: Digest | None  # the layer's chainID
    image: RegistryLocation | None
    manifest: Digest | None  # of the image's manifest, never of an index
    layer: Digest | None  # of the layer's blob
    snapshot: Digest | None  # that a converted image's stub names


def parse_image_labels(labels: Mapping[str, str]) -> ImageLabels:
    """Raises InvalidArgument or LimitExceeded for a value that is not what its name says."""
    return ImageLabels(
        target=_digest(labels, names.TARGET),
        image=_image(labels),
        manifest=_digest(labels, names.MANIFEST_DIGEST),
        layer=_digest(labels, names.LAYER_DIGEST),
        snapshot=_digest(labels, names.SNAPSHOT_DIGEST),
    )


def registry_location(name: str) -> RegistryLocation:
    """The registry's repository or image that `name` is, as containerd writes references: with the
    registry's host. Never a local place, whatever it looks like. Raises InvalidReference.
    """
    location = parse_location(f"docker://{name}")
    if not isinstance(location, RegistryLocation) or not name.startswith(location.registry + "/"):
        raise InvalidReference(f"{name[:300]!r} names no registry")
    return location


def repository_name(location: RegistryLocation) -> str:
    """``registry.example/team/app``: as `ImageSnapshot.repository` has it."""
    return f"{location.registry}/{location.repository}"


def _digest(labels: Mapping[str, str], name: str) -> Digest | None:
    _check_size(labels.get(name, ""), name)
    return names.digest_label(labels, name)


def _image(labels: Mapping[str, str]) -> RegistryLocation | None:
    text = labels.get(names.IMAGE_REF)
    if text is None:
        return None
    _check_size(text, names.IMAGE_REF)
    if not text.isascii() or not text.isprintable():
        raise InvalidArgument(f"{names.IMAGE_REF}: {text[:100]!r} is no reference")
    return registry_location(text)


def _check_size(value: str, name: str) -> None:
    if len(value) > names.LABEL_BYTES_MAX:
        raise LimitExceeded("LABEL_BYTES_MAX", len(value), names.LABEL_BYTES_MAX, where=name)
