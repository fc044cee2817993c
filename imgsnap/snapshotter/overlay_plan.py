"""What each directory of a layer has to say to overlayfs, given the layers beneath.

overlayfs merges a directory with the lower ones and shows the attributes of the uppermost. So a
directory that the layer has no entry for gets the attributes of the lower one; one that hides the
lower ones is opaque; and a whiteout is made only where there is something to hide, because
overlayfs lists idle ones.

Where a lower layer has a symlink, a directory without an entry takes its place, as in containerd's
overlayfs snapshotter; extraction into one tree would follow it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from imgsnap.formats.layer_index import DirectoryRecord
from imgsnap.snapshotter.lower_view import LowerEntry, LowerView


@dataclass(frozen=True, slots=True)
class PlannedDirectory:
    """One directory of a layer."""

    parts: tuple[bytes, ...]  # () is the root
    record: DirectoryRecord
    opaque: bool
    whiteouts: tuple[bytes, ...]
    beneath: LowerEntry | None  # the lower directory that it is seen as, hidden content or not


def plan(records: Sequence[DirectoryRecord], lower: LowerView) -> list[PlannedDirectory]:
    """The directories in the order of a walk: what is below one follows it at once."""
    parted = [(tuple(record.path.split(b"/")), record) for record in records if record.path]
    parted.sort(key=lambda item: item[0])
    root = next((record for record in records if not record.path), DirectoryRecord(b""))
    planner = _Planner(lower, {record.path for _, record in parted})
    return [planner.add((), root), *(planner.add(parts, record) for parts, record in parted)]


class _Planner:
    def __init__(self, lower: LowerView, paths: set[bytes]) -> None:
        self._lower = lower
        self._paths = paths  # of this layer's directories
        self._merged: dict[bytes, bool] = {}  # is what lower layers have in it seen?
        self._hidden: dict[bytes, set[bytes]] = {}  # names in it that the layer hides

    def add(self, parts: tuple[bytes, ...], record: DirectoryRecord) -> PlannedDirectory:
        path = record.path
        parent, _, name = path.rpartition(b"/")
        found = self._lower.find(path) if not path or self._merged[parent] else None
        lower = found if found is not None and found.is_directory else None
        whited_out = bool(path) and name in self._hidden[parent]
        hides_all = record.opaque or whited_out
        # overlayfs merges the roots whatever they say: there, every name is hidden by itself.
        self._merged[path] = lower is not None and not (hides_all and path)
        self._hidden[path] = set(record.whiteouts)
        if record.opaque and not path:
            self._hidden[path] |= self._lower.names(path)
        return PlannedDirectory(
            parts,
            record,
            opaque=lower is not None and hides_all and bool(path),
            whiteouts=self._whiteouts(record),
            beneath=None if whited_out else lower,
        )

    def _whiteouts(self, record: DirectoryRecord) -> tuple[bytes, ...]:
        if not self._merged[record.path]:
            return ()
        prefix = record.path + b"/" if record.path else b""
        own = set(record.names)
        return tuple(
            name
            for name in sorted(self._hidden[record.path] - own)
            if prefix + name not in self._paths and self._lower.find(prefix + name) is not None
        )
