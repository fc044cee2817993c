"""The labels that reach a snapshotter, and their hostile values, parsed and limited.

Names: containerd's core/snapshots/snapshotter.go and pkg/snapshotters/annotations.go. Values
under ``containerd.io/snapshot/`` are annotations of the manifest: the image's author writes them.
"""

from collections.abc import Mapping

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import InvalidArgument, LimitExceeded

TARGET = "containerd.io/snapshot.ref"
"""The chainID that a Prepare is to be committed as: the client asks for a remote snapshot."""
PREFIX = "containerd.io/snapshot/"
IMAGE_REF = PREFIX + "cri.image-ref"
MANIFEST_DIGEST = PREFIX + "cri.manifest-digest"
LAYER_DIGEST = PREFIX + "cri.layer-digest"
IMAGE_LAYERS = PREFIX + "cri.image-layers"
"""From this layer to the top, cut at 4096 bytes: never the whole list."""
SNAPSHOT_DIGEST = PREFIX + "imgsnap.digest"
"""Ours: annotation of a converted manifest's stub layer, the digest of its snapshot."""
UID_MAPPING = PREFIX + "uidmapping"
GID_MAPPING = PREFIX + "gidmapping"

LABEL_BYTES_MAX = 4096
"""Of a name and its value together, as containerd's labels.Validate."""
LABELS_MAX = 1024
MAPPINGS_MAX = 340
"""Ranges of a user namespace, as the kernel's own limit."""
ID_MAX = (1 << 32) - 2
NAME_BYTES_MAX = 4096
"""Of a snapshot's key."""


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of `labels`. Raises LimitExceeded when there are too many or one is too long."""
    if len(labels) > LABELS_MAX:
        raise LimitExceeded("LABELS_MAX", len(labels), LABELS_MAX, where="labels")
    for name, value in labels.items():
        size = len(name.encode()) + len(value.encode())
        if size > LABEL_BYTES_MAX:
            raise LimitExceeded("LABEL_BYTES_MAX", size, LABEL_BYTES_MAX, where=name[:64])
    return dict(labels)


def check_name(name: str, *, what: str = "key") -> str:
    """`name` as the name of a snapshot. Raises InvalidArgument or LimitExceeded."""
    size = len(name.encode())
    if size > NAME_BYTES_MAX:
        raise LimitExceeded("NAME_BYTES_MAX", size, NAME_BYTES_MAX, where=what)
    if not name or "\0" in name:
        raise InvalidArgument(f"{what}: a snapshot's name is not empty and has no zero byte")
    return name


def digest_label(labels: Mapping[str, str], name: str) -> Digest | None:
    """The digest that the label holds; None without the label. Raises InvalidArgument."""
    value = labels.get(name)
    return None if value is None else parse_digest(value, what=name)


def mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """Who root of the container's user namespace is on the host, as (uid, gid).

    None without the labels. A label is ``container:host:size[,…]``. Raises InvalidArgument.
    """
    uids, gids = labels.get(UID_MAPPING), labels.get(GID_MAPPING)
    if uids is None and gids is None:
        return None
    return _host_of_root(uids or "", UID_MAPPING), _host_of_root(gids or "", GID_MAPPING)


def _host_of_root(mapping: str, what: str) -> int:
    ranges = mapping.split(",")
    if len(ranges) > MAPPINGS_MAX:
        raise LimitExceeded("MAPPINGS_MAX", len(ranges), MAPPINGS_MAX, where=what)
    found = None
    for text in ranges:
        parts = text.split(":")
        if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 11 for p in parts):
            raise InvalidArgument(f"{what}: {text[:100]!r} is not container:host:size")
        inside, outside, size = map(int, parts)
        if not size or max(inside, outside) + size - 1 > ID_MAX:
            raise InvalidArgument(f"{what}: {text!r} is out of range")
        if inside == 0:
            found = outside
    if found is None:
        raise InvalidArgument(f"{what}: {mapping[:100]!r} maps no root")
    return found
