"""Edits an image index that others write too: fields that we do not know survive.

Works on decoded JSON instead of ImageIndex, because an entry may carry members of a later
specification (or of another tool) that must not be lost when one entry is added.
"""

from typing import Any

from imgsnap.digest import Digest
from imgsnap.errors import LimitExceeded
from imgsnap.oci.manifest import (
    canonical_json,
    descriptor_to_json,
    parse_index,
    parse_json_object,
)
from imgsnap.oci.media_types import OCI_INDEX, REF_NAME
from imgsnap.oci.repository import Descriptor

Index = dict[str, Any]
"""An index as decoded JSON; made by empty() or from_bytes() only."""


def empty() -> Index:
    """An index without entries."""
    return {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}


def from_bytes(raw: bytes, *, record: str) -> Index:
    """A checked index. Raises what parse_index raises."""
    parse_index(raw, media_type=OCI_INDEX, record=record)
    value = parse_json_object(raw, record=record)
    value["manifests"] = value["manifests"] or []
    return value


def to_bytes(index: Index, *, size_max: int) -> bytes:
    """Canonical bytes. Raises LimitExceeded over `size_max` bytes."""
    raw = canonical_json(index)
    if len(raw) > size_max:
        raise LimitExceeded("oci.index_size_max", len(raw), size_max, where="image index")
    return raw


def has_digest(index: Index, digest: Digest) -> bool:
    """Whether an entry has this digest."""
    return any(entry["digest"] == digest for entry in index["manifests"])


def add(index: Index, descriptor: Descriptor, *, ref_name: str | None = None) -> None:
    """Appends an entry; `ref_name` becomes its name in an image layout."""
    entry = descriptor_to_json(descriptor)
    if ref_name is not None:
        entry["annotations"] = {**entry.get("annotations", {}), REF_NAME: ref_name}
    index["manifests"].append(entry)


def ref_name(entry: dict[str, Any]) -> str | None:
    """The layout name of an entry."""
    name = (entry.get("annotations") or {}).get(REF_NAME)
    return name if isinstance(name, str) else None


def remove_name(index: Index, name: str) -> list[dict[str, Any]]:
    """Removes the entries with this layout name and returns them."""
    removed = [entry for entry in index["manifests"] if ref_name(entry) == name]
    index["manifests"] = [entry for entry in index["manifests"] if ref_name(entry) != name]
    return removed


def digests_named(index: Index, name: str) -> list[str]:
    """The digests of the entries with this layout name; one, unless the index is odd."""
    return [entry["digest"] for entry in index["manifests"] if ref_name(entry) == name]
