"""What containerd is told to mount: the forms of its overlayfs snapshotter.

Source: plugins/snapshots/overlay/overlay.go. A snapshot that layers are extracted into is always
writable: a read-only last mount would make containerd 2.4 take the layer as there already.
"""

from dataclasses import dataclass
from pathlib import Path

_INDEX_PARAMETER = Path("/sys/module/overlay/parameters/index")


@dataclass(frozen=True, slots=True)
class Mount:
    """As containerd's types.Mount without a target."""

    type: str
    source: str
    options: tuple[str, ...]


def writable(lowers: tuple[Path, ...], upper: Path, work: Path) -> list[Mount]:
    """The mounts of a writable snapshot; `lowers` from the top down."""
    if not lowers:
        return [_bind(upper, "rw")]
    return [_overlay((f"workdir={work}", f"upperdir={upper}"), lowers)]


def read_only(lowers: tuple[Path, ...], empty: Path) -> list[Mount]:
    """The mounts of a view; `empty` is what it shows without any lower."""
    if len(lowers) < 2:
        return [_bind(lowers[0] if lowers else empty, "ro")]
    return [_overlay((), lowers)]


def _bind(source: Path, mode: str) -> Mount:
    return Mount("bind", str(source), (mode, "rbind"))


def _overlay(options: tuple[str, ...], lowers: tuple[Path, ...]) -> Mount:
    # one upper in two mounts, which containerd has for a moment, is refused with an index
    index = ("index=off",) if _INDEX_PARAMETER.exists() else ()
    lower = "lowerdir=" + ":".join(map(str, lowers))
    return Mount("overlay", "overlay", (*index, *options, lower))
