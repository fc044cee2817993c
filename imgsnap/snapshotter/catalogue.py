"""What this node knows of images and their snapshots, across restarts and without a registry.

    <root>/images/<sha256 of "repository NUL manifest digest">    an ImageSnapshot
    <root>/places/<hex of the snapshot's digest>                  a repository that has it

Plain JSON, written beside and renamed, synced before: a crash leaves the old file or the new one.
The key of an image holds its repository: a snapshot that one repository offers for an image says
nothing about the same image in another, where others may push.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from imgsnap.digest import Digest, chain_ids, digest_hex, parse_digest
from imgsnap.errors import FormatError, ImgsnapError
from imgsnap.oci.manifest import canonical_json, parse_json_object
from imgsnap.snapshotter.image_labels import registry_location, repository_name
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot

RECORD = "catalogue entry"
VERSION = 1
ENTRY_SIZE_MAX = 1 << 20
LAYERS_MAX = 500
"""As imgsnap.convert.limits.Limits.layers: overlayfs stops there."""
ENTRIES_MAX = 4096
"""Of each kind; the oldest go. A node has some hundred images."""
_MEDIA_TYPE_MAX = 255

_log = logging.getLogger(__name__)


class Catalogue:
    """Files below `root`; processes may share it. Thread safe: the file system is."""

    def __init__(self, root: Path, *, entries_max: int = ENTRIES_MAX) -> None:
        self._images, self._places = root / "images", root / "places"
        self._entries_max = entries_max
        for directory in (self._images, self._places):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def load(self, repository: str, manifest: Digest) -> ImageSnapshot | None:
        """The snapshot of the image with this manifest; None when it is not known."""
        path = self._images / _image_key(repository, manifest)
        value = _read(path)
        if value is None:
            return None
        try:
            if (value.get("repository"), value.get("manifest")) != (repository, manifest):
                raise FormatError(RECORD, "manifest", 0, "is another image's")
            return _from_json(value)
        except ImgsnapError as error:
            _discard(path, error)
            return None

    def store(self, repository: str, manifest: Digest, found: ImageSnapshot) -> None:
        """Keeps what was found and verified. Raises OSError."""
        value = {"repository": repository, "manifest": manifest, **_to_json(found)}
        _write(self._images / _image_key(repository, manifest), value)
        _limit(self._images, self._entries_max)
        self.store_place(found)

    def forget(self, repository: str, manifest: Digest) -> None:
        """The image is looked up anew."""
        (self._images / _image_key(repository, manifest)).unlink(missing_ok=True)

    def place_of(self, snapshot: Digest) -> str | None:
        """A repository from which this snapshot was opened before."""
        path = self._places / digest_hex(snapshot)
        value = _read(path)
        if value is None:
            return None
        try:
            return _repository(value)
        except ImgsnapError as error:
            _discard(path, error)
            return None

    def store_place(self, snapshot: ImageSnapshot) -> None:
        """The snapshot is in its repository: it has been seen there. Raises OSError."""
        path = self._places / digest_hex(snapshot.digest)
        if self.place_of(snapshot.digest) != snapshot.repository:
            _write(path, {"version": VERSION, "repository": snapshot.repository})
            _limit(self._places, self._entries_max)


def _image_key(repository: str, manifest: Digest) -> str:
    return hashlib.sha256(f"{repository}\0{manifest}".encode()).hexdigest()


def _to_json(found: ImageSnapshot) -> dict[str, Any]:
    layers = [
        {"diffID": item.diff_id, "digest": item.digest, "size": item.size, "type": item.media_type}
        for item in found.layers
    ]
    return {
        "version": VERSION,
        "snapshot": {"repository": found.repository, "digest": found.digest},
        "layers": layers,
    }


def _from_json(value: dict[str, Any]) -> ImageSnapshot:
    snapshot, layers = value.get("snapshot"), value.get("layers")
    if not isinstance(snapshot, dict) or not isinstance(layers, list):
        raise FormatError(RECORD, "snapshot", 0, "is missing")
    if value.get("version") != VERSION or not 1 <= len(layers) <= LAYERS_MAX:
        raise FormatError(RECORD, "layers", 0, "another version, or no layers")
    if not all(isinstance(layer, dict) for layer in layers):
        raise FormatError(RECORD, "layers", 0, "are not objects")
    chain = chain_ids([_digest(layer, "diffID") for layer in layers])
    return ImageSnapshot(
        _repository({**snapshot, "version": VERSION}),
        _digest(snapshot, "digest"),
        tuple(_layer(layer, chain_id) for layer, chain_id in zip(layers, chain, strict=True)),
    )


def _layer(value: dict[str, Any], chain_id: Digest) -> ImageLayer:
    size, media_type = value.get("size"), value.get("type")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise FormatError(RECORD, "size", 0, "is no size")
    if not isinstance(media_type, str) or len(media_type) > _MEDIA_TYPE_MAX:
        raise FormatError(RECORD, "type", 0, "is no media type")
    return ImageLayer(
        _digest(value, "diffID"), _digest(value, "digest"), size, media_type, chain_id
    )


def _digest(value: dict[str, Any], name: str) -> Digest:
    return parse_digest(value.get(name, ""), what=name)


def _repository(value: dict[str, Any]) -> str:
    name = value.get("repository")
    if value.get("version") != VERSION or not isinstance(name, str):
        raise FormatError(RECORD, "repository", 0, "another version, or no repository")
    if repository_name(registry_location(name)) != name:
        raise FormatError(RECORD, "repository", 0, f"{name[:100]!r} is no repository")
    return name


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            return parse_json_object(file.read(ENTRY_SIZE_MAX), record=RECORD)
    except FileNotFoundError:
        return None
    except (OSError, ImgsnapError) as error:
        _discard(path, error)
        return None


def _discard(path: Path, error: Exception) -> None:
    _log.warning("%s is damaged and taken for absent: %s", path, error)
    with contextlib.suppress(OSError):
        path.unlink()


def _write(path: Path, value: dict[str, Any]) -> None:
    raw = canonical_json(value)
    if len(raw) >= ENTRY_SIZE_MAX:
        raise FormatError(RECORD, "length", 0, f"{len(raw)} bytes is over {ENTRY_SIZE_MAX}")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _limit(directory: Path, entries_max: int) -> None:
    """Removes the oldest files over the limit; what a crash left half-written goes with them."""
    aged: list[tuple[float, str]] = []
    with os.scandir(directory) as found:
        for entry in found:
            with contextlib.suppress(FileNotFoundError):
                aged.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(aged)[: max(0, len(aged) - entries_max)]:
        Path(path).unlink(missing_ok=True)
