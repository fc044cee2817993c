"""The record of one containerd snapshot, and its JSON form in the ledger."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, IntegrityError
from imgsnap.snapshotter.seams import ImageLayer

STATES = ("active", "view", "layer", "placeholder", "device")
"""What `Row.state` may be."""


class WrongState(ImgsnapError):
    """The containerd snapshot is not in the state that the call needs (FAILED_PRECONDITION)."""


class Kind(IntEnum):
    """As in containerd's snapshots.proto; the lower-case name is what filters compare."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Usage:
    """What a directory takes on disk, as containerd counts: every inode once, itself included."""

    size: int
    """Bytes allocated."""
    inodes: int


@dataclass(frozen=True, slots=True)
class Claim:
    """What a row has that was claimed for a converted image, so that its layer was not fetched."""

    repository: str
    layer: ImageLayer
    device: Digest | None = None
    """The snapshot whose EROFS is the content of this row and of all beneath; None: a placeholder,
    whose layer nobody has unless it was materialised."""
    materialised: bool = False
    """Whether the layer was unpacked into the row's directory after all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One containerd snapshot."""

    id: int
    """Names its directory; never used twice."""
    name: str
    parent: str
    """The name of the row beneath; empty at the bottom. Committed rows never change their name."""
    kind: Kind
    created: int
    """Nanoseconds since the epoch, as `updated`."""
    updated: int
    labels: Mapping[str, str]
    usage: Usage | None = None
    """Of a committed row's directory, once it was measured."""
    claim: Claim | None = None

    @property
    def device(self) -> Digest | None:
        """The snapshot that is the content of this row and of all beneath."""
        return self.claim.device if self.claim else None

    @property
    def is_placeholder(self) -> bool:
        """Whether nobody has this row's layer yet."""
        return bool(self.claim and not self.claim.device and not self.claim.materialised)

    @property
    def has_directory(self) -> bool:
        """Whether the row's content is a directory of ours."""
        return self.claim is None or self.claim.materialised

    @property
    def state(self) -> str:
        """One of STATES, for people."""
        if self.kind is not Kind.COMMITTED:
            return self.kind.name.lower()
        if self.device is not None:
            return "device"
        return "placeholder" if self.is_placeholder else "layer"

    @property
    def target(self) -> str | None:
        """The chainID that a claimed row stands for."""
        return self.claim.layer.chain_id if self.claim else None


def encode(row: Row) -> str:
    """The part of a row that has no column of its own in the ledger, as JSON."""
    body: dict[str, Any] = {
        "kind": row.kind.name.lower(),
        "created": row.created,
        "updated": row.updated,
        "labels": dict(row.labels),
    }
    if row.usage is not None:
        body["usage"] = asdict(row.usage)
    if row.claim is not None:
        body["claim"] = asdict(row.claim)
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def decode(row_id: int, name: str, parent: str, text: str) -> Row:
    """The row that `encode` wrote. Raises IntegrityError."""
    try:
        body = json.loads(text)
        usage, claim = body.get("usage"), body.get("claim")
        return Row(
            row_id,
            name,
            parent,
            Kind[body["kind"].upper()],
            int(body["created"]),
            int(body["updated"]),
            {str(label): str(value) for label, value in body["labels"].items()},
            Usage(**usage) if usage else None,
            Claim(**{**claim, "layer": ImageLayer(**claim["layer"])}) if claim else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"the ledger's row {row_id} ({name[:100]!r}) is damaged: {error}",
            hint="imgsnap snapshotter check",
        ) from error
