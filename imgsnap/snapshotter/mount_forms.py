"""What containerd is told to mount.

By default the forms of its overlayfs snapshotter, over directories of ours. Where a snapshot of
imgsnap is all that is beneath, its file can be named instead. Sources: containerd's
plugins/snapshots/overlay/overlay.go, plugins/snapshots/erofs/erofs.go and docs/mounts.md.

A snapshot that layers are extracted into is always writable and always of the first form: a
read-only last mount would make containerd 2.4 take the layer as there already, and what extracts
knows no mount manager before 2.2.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_INDEX_PARAMETER = Path("/sys/module/overlay/parameters/index")


class MountForm(StrEnum):
    """What containerd mounts where a snapshot of imgsnap is all that is beneath."""

    OVERLAY = "overlay"  # overlays and binds of where we have mounted it: every version
    EROFS = "erofs"  # and views as the file itself
    MANAGER = "manager"  # containers too: its mount manager mounts file and overlay, from 2.2 on


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
    return [_overlay(upper, work, ":".join(map(str, lowers)))]


def managed(file: Path, upper: Path, work: Path) -> list[Mount]:
    """The same over an EROFS file, which the mount manager mounts first. Runtimes that can (Kata's
    runtime-rs) get the list as it is, and mount in their guest."""
    overlay = _overlay(upper, work, "{{ mount 0 }}")
    return [erofs(file), Mount(f"format/mkdir/{overlay.type}", overlay.source, overlay.options)]


def read_only(lowers: tuple[Path, ...], empty: Path) -> list[Mount]:
    """The mounts of a view; `empty` is what it shows without any lower."""
    if len(lowers) < 2:
        return [_bind(lowers[0] if lowers else empty, "ro")]
    return [Mount("overlay", "overlay", (*_index_off(), _lower(":".join(map(str, lowers)))))]


def erofs(file: Path) -> Mount:
    """A snapshot's file, read-only, without a loop device."""
    return Mount("erofs", str(file), ("ro",))


def _bind(source: Path, mode: str) -> Mount:
    return Mount("bind", str(source), (mode, "rbind"))


def _overlay(upper: Path, work: Path, lower: str) -> Mount:
    options = (*_index_off(), f"workdir={work}", f"upperdir={upper}", _lower(lower))
    return Mount("overlay", "overlay", options)


def _lower(lower: str) -> str:
    return f"lowerdir={lower}"


def _index_off() -> tuple[str, ...]:
    """One upper in two mounts, which containerd has for a moment, is refused with an index."""
    return ("index=off",) if _INDEX_PARAMETER.exists() else ()
