"""Layers of converted images: claimed without being fetched, and made real when need be.

A claimed row either has a device, which is its content and that of all beneath it, or is a
placeholder. Who stacks something on a placeholder with no device above it gets that one layer
fetched and unpacked.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from imgsnap.digest import Digest
from imgsnap.errors import (
    Busy,
    ImgsnapError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    Unsupported,
)
from imgsnap.snapshotter.directories import Directories
from imgsnap.snapshotter.labels import TARGET, digest_label
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.locks import KeyedLocks
from imgsnap.snapshotter.rows import Claim, Kind, Row
from imgsnap.snapshotter.seams import Devices, ImageFinder, ImageSnapshot, LayerUnpacker

_log = logging.getLogger(__name__)


class Claims:
    """Safe for threads. Whatever is slow here happens in Prepare and View, outside the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        directories: Directories,
        finder: ImageFinder | None = None,
        devices: Devices | None = None,
        unpacker: LayerUnpacker | None = None,
    ) -> None:
        self._ledger = ledger
        self._directories = directories
        self._finder = finder
        self._devices = devices
        self._unpacker = unpacker
        self._locks = KeyedLocks()

    # Claiming --------------------------------------------------------------------------------

    def claim(self, parent: str, labels: Mapping[str, str]) -> Row | None:
        """The row that stands for the layer these labels name; None: it is to be fetched.

        The row is durable, and the image's device was opened and verified.
        """
        if TARGET not in labels or self._finder is None or self._devices is None:
            return None
        try:
            target = digest_label(labels, TARGET)
        except InvalidArgument as error:
            _log.warning("not claimed: %s", error)
            return None
        image = self._finder.find(labels)
        if target is None or image is None:
            return None
        index = self._index(image, target, parent)
        return None if index is None else self._show_and_claim(image, index, parent, labels)

    def _index(self, image: ImageSnapshot, target: Digest, parent: str) -> int | None:
        """Which layer of the image `target` is; None unless `parent` is the layer beneath."""
        chain = [layer.chain_id for layer in image.layers]
        if target not in chain:
            _log.warning("not claimed: %s is no layer of %s", target, image.digest)
            return None
        index = chain.index(target)
        beneath = chain[index - 1] if index else ""
        if self._chain_id(parent) != beneath:
            _log.warning("not claimed: %s is not prepared on the layer beneath it", target)
            return None
        return index

    def _chain_id(self, name: str) -> str:
        """The chainID that a parent stands for: claimed, or in the name that containerd gave."""
        row = self._ledger.get(name) if name else None
        return (row.target if row else None) or name.rpartition("/")[2]

    def _show_and_claim(
        self, image: ImageSnapshot, index: int, parent: str, labels: Mapping[str, str]
    ) -> Row | None:
        if self._devices is None or self._finder is None:
            return None
        device = image.digest if index == len(image.layers) - 1 else None
        # a device is not released between being shown and being in a row
        with self._locks.hold(image.digest):
            try:
                self._devices.show(image.repository, image.digest)
            except ImgsnapError as error:
                _log.warning("not claimed: %s of %s: %s", image.digest, image.repository, error)
                if isinstance(error, NotFound | IntegrityError):
                    self._finder.gone(labels)
                return None
            self._finder.opened(image)
            return self._write(Claim(image.repository, image.layers[index], device), parent, labels)

    def _write(self, claim: Claim, parent: str, labels: Mapping[str, str]) -> Row:
        now = time.time_ns()
        with self._ledger.change() as changes:
            beneath = committed_parent(self._ledger, parent)
            old = self._ledger.claimed(claim.layer.chain_id, parent)
            if old is None:
                suffix = f"@{beneath.id}" if beneath else ""
                name = f"imgsnap/{claim.layer.chain_id}{suffix}"
                row = Row(0, name, parent, Kind.COMMITTED, now, now, dict(labels), claim=claim)
                return changes.insert(row)
            if claim.device is not None and old.is_placeholder:  # the top of another image
                old = replace(old, claim=claim, updated=now)
                changes.update(old)
            return old

    # What is beneath a snapshot --------------------------------------------------------------

    def lowers(self, parent: str) -> tuple[Path, ...]:
        """The directories of the row `parent` and all beneath it, from the top down.

        Shows a device and materialises placeholders, so it may take long. Raises ImgsnapError.
        """
        rows: list[Row] = []
        for row in self._ledger.chain(parent):
            rows.append(row)
            if row.device is not None:
                break  # it is the content of all beneath as well
        found: tuple[Path, ...] = ()
        for row in reversed(rows):  # a layer is unpacked with a view of those beneath it
            found = self._stack(row, found)
        return found

    def _stack(self, row: Row, lowers: tuple[Path, ...]) -> tuple[Path, ...]:
        """The directories from `row` down, given those beneath it."""
        if row.is_placeholder:
            row = self._materialised(row, lowers)
        if row.device is not None:
            return (self._show(row, row.device),)
        return (self._directories.fs(row.id), *lowers)

    def _show(self, row: Row, device: Digest) -> Path:
        if self._devices is None or row.claim is None:
            raise Unsupported(
                f"snapshot {row.name!r} is {device}, and this snapshotter mounts no devices"
            )
        return self._devices.show(row.claim.repository, device)

    def _materialised(self, row: Row, lowers: Sequence[Path]) -> Row:
        """A placeholder after its layer was fetched; who comes second waits for the first."""
        with self._locks.hold(row.id):
            now = self._ledger.get(row.name)
            if now.is_placeholder and now.claim is not None:
                self._unpack(now, now.claim, lowers)
        return self._ledger.get(row.name)

    def _unpack(self, row: Row, claim: Claim, lowers: Sequence[Path]) -> None:
        if self._unpacker is None:
            raise Unsupported(f"snapshot {row.name!r} has no content, and nothing unpacks it")
        _log.info("fetching layer %s of %s", claim.layer.digest, claim.repository)
        place = self._directories.create(writable=False)
        try:
            self._unpacker.unpack(claim.repository, claim.layer, place / "fs", lowers)
            self._directories.sync(place)  # nobody would look at these bytes again
            with self._ledger.change() as changes:
                now = self._ledger.get(row.name)
                if now.claim == claim:  # or it has become a device, and these bytes are in vain
                    place = self._directories.settle(place, row.id)
                    changes.update(replace(now, claim=replace(claim, materialised=True)))
                    return
        except BaseException:
            self._directories.discard(place)
            raise
        self._directories.discard(place)

    # Releasing -------------------------------------------------------------------------------

    def release_unused(self) -> None:
        """Gives back the devices that no row needs; those still in use at the next call."""
        if self._devices is None:
            return
        for snapshot in list(self._devices.shown()):
            with self._locks.attempt(snapshot) as mine:  # or it is being claimed, and needed
                if not mine or self._ledger.uses_device(snapshot):
                    continue
                try:
                    self._devices.release(snapshot)
                except Busy as error:
                    _log.info("%s is still in use: %s", snapshot, error)
                except ImgsnapError as error:
                    _log.warning("%s is not released: %s", snapshot, error)


def committed_parent(ledger: Ledger, parent: str) -> Row | None:
    """The row to stack something on; None at the bottom. Raises NotFound, InvalidArgument."""
    if not parent:
        return None
    row = ledger.get(parent)
    if row.kind is not Kind.COMMITTED:
        raise InvalidArgument(f"parent {parent!r} is not a committed snapshot")
    return row
