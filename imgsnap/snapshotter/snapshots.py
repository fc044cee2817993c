"""The semantics of containerd's ten snapshot calls, without gRPC.

Source: containerd's core/snapshots/snapshotter.go and core/snapshots/storage/bolt.go. A change is
durable when its call returns. Commit and Remove cost one transaction, whatever the tree's size:
containerd makes them inside its own global one.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from imgsnap.errors import AlreadyExists, Busy, ImgsnapError, InvalidArgument
from imgsnap.snapshotter import mount_forms
from imgsnap.snapshotter.claims import Claims, committed_parent
from imgsnap.snapshotter.directories import Directories, take_over
from imgsnap.snapshotter.filters import parse_filters
from imgsnap.snapshotter.labels import TARGET, check_labels, check_name, mapped_root
from imgsnap.snapshotter.ledger import Ledger
from imgsnap.snapshotter.mount_forms import Mount, MountForm
from imgsnap.snapshotter.rows import Kind, Row, Usage, WrongState
from imgsnap.snapshotter.seams import OnUse

_log = logging.getLogger(__name__)
_LABEL_PATH = "labels."
_EXTRACTION = "extract-"
"""Begins the name that clients of containerd give to what they extract a layer into."""


class Snapshots:
    """The ten calls. Safe for threads. All raise ImgsnapError."""

    def __init__(
        self,
        ledger: Ledger,
        directories: Directories,
        claims: Claims,
        form: MountForm = MountForm.OVERLAY,
        on_use: OnUse | None = None,
    ) -> None:
        self._ledger = ledger
        self._directories = directories
        self._claims = claims
        self._mount_form = form
        self._on_use = on_use
        self._background = ThreadPoolExecutor(1, thread_name_prefix="snapshots")

    def recover(self) -> None:
        """Finishes what a killed process began. Before the first call, and once."""
        rows = self._ledger.scan()
        self._directories.discard_scratch()
        self._directories.discard_unused({row.id for row in rows if row.has_directory})
        present = self._directories.numbers()
        for row in rows:
            if row.has_directory and row.id not in present:
                _log.error("snapshot %r has lost its directory", row.name)
            elif row.has_directory and row.kind is Kind.COMMITTED and row.usage is None:
                self._background.submit(self._measure_quietly, row)
        self._background.submit(self._directories.empty_removed)

    def close(self) -> None:
        """Ends background work; what is not done is done after the next start."""
        self._background.shutdown(cancel_futures=True)

    # Making ----------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A writable snapshot on `parent`.

        Raises AlreadyExists also when the labels ask for a layer that was claimed: the client
        then finds the row by its label and fetches nothing.
        """
        labels = check_labels(labels)
        if self._ledger.find(check_name(key)) is None and TARGET in labels:
            committed_parent(self._ledger, parent)
            claimed = self._claims.claim(parent, labels)
            if claimed is not None:
                raise AlreadyExists(f"snapshot {labels[TARGET]} is {claimed.name!r}")
        made = self._create(Kind.ACTIVE, key, parent, labels)
        if parent and not _is_extraction(key, labels):
            self._note_use(parent)
        return made

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """A read-only snapshot of `parent`."""
        return self._create(Kind.VIEW, check_name(key), parent, check_labels(labels))

    def _create(self, kind: Kind, key: str, parent: str, labels: dict[str, str]) -> list[Mount]:
        root = mapped_root(labels)
        beneath = self._may_create(key, parent)
        lowers = self._claims.lowers(parent) if parent else ()
        now = time.time_ns()
        row = Row(0, key, parent, kind, now, now, _without_empty(labels))
        file = self._file(row)  # may fail: before there is a row
        place = self._directories.create(writable=kind is Kind.ACTIVE)
        try:
            try:
                _set_owner(place / "fs", root, lowers)
            except FileNotFoundError as error:  # nothing keeps the parent before there is a row
                self._may_create(key, parent)
                raise Busy(f"parent {parent!r} changed meanwhile; try again") from error
            with self._ledger.change() as changes:
                if self._may_create(key, parent) != beneath:
                    raise Busy(f"parent {parent!r} changed meanwhile; try again")
                row = changes.insert(row)
                place = self._directories.settle(place, row.id)
        except BaseException:
            self._directories.discard(place)
            raise
        return self._form(row, lowers, file)

    def _note_use(self, parent: str) -> None:
        top = self._ledger.find(parent) if self._on_use else None
        if self._on_use and top is not None and top.claim is None:
            self._on_use(top.labels)

    def _may_create(self, key: str, parent: str) -> int | None:
        """The id of the parent. Raises AlreadyExists, NotFound, InvalidArgument."""
        if self._ledger.find(key) is not None:
            raise AlreadyExists(f"snapshot {key!r} exists")
        beneath = committed_parent(self._ledger, parent)
        return beneath.id if beneath else None

    def mounts(self, key: str) -> list[Mount]:
        """The mounts of a writable snapshot or a view, once more."""
        row = self._ledger.get(key)
        if row.kind is Kind.COMMITTED:
            raise WrongState(f"snapshot {key!r} is committed, it is not mounted itself")
        lowers = self._claims.lowers(row.parent) if row.parent else ()
        return self._form(row, lowers, self._file(row))

    def _form(self, row: Row, lowers: tuple[Path, ...], file: Path | None) -> list[Mount]:
        tree, work = self._directories.fs(row.id), self._directories.work(row.id)
        if row.kind is Kind.VIEW:
            return [mount_forms.erofs(file)] if file else mount_forms.read_only(lowers, tree)
        if file is not None:
            return mount_forms.managed(file, tree, work)
        return mount_forms.writable(lowers, tree, work)

    def _file(self, row: Row) -> Path | None:
        """What is mounted as EROFS by others: never beneath a layer that is being extracted."""
        form = self._mount_form
        if form is MountForm.OVERLAY or not row.parent or _is_extraction(row.name, row.labels):
            return None
        if form is MountForm.EROFS and row.kind is not Kind.VIEW:
            return None
        return self._claims.file(row.parent)

    # Changing --------------------------------------------------------------------------------

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """Makes a writable snapshot the committed one `name`, with these labels and no others.

        A `parent` other than the row's is refused: we do not offer `rebase`.
        """
        name, labels = check_name(name, what="name"), _without_empty(check_labels(labels))
        with self._ledger.change() as changes:
            row = self._ledger.get(key)
            if self._ledger.find(name) is not None:
                raise AlreadyExists(f"committed snapshot {name!r} exists")
            if row.kind is not Kind.ACTIVE:
                raise WrongState(f"snapshot {key!r} is not active")
            if parent not in ("", row.parent):
                raise InvalidArgument(f"snapshot {key!r} has another parent than {parent!r}")
            now = time.time_ns()
            row = replace(
                row, name=name, kind=Kind.COMMITTED, labels=labels, created=now, updated=now
            )
            changes.update(row)
        self._background.submit(self._measure_quietly, row)

    def remove(self, key: str) -> None:
        """Forgets a snapshot; its directory is deleted in `cleanup`."""
        with self._ledger.change() as changes:
            row = self._ledger.get(key)
            if self._ledger.has_children(key):
                raise WrongState(f"cannot remove snapshot {key!r}, which has children")
            changes.delete(row)
        try:
            self._directories.drop(row.id)
        except OSError as error:  # the next start does it
            _log.warning("the directory of %r stays for now: %s", key, error)

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str]) -> Row:
        """Replaces the labels, or those that `paths` names (`labels`, `labels.NAME`)."""
        given = check_labels(labels)
        with self._ledger.change() as changes:
            row = self._ledger.get(name)
            merged = dict(row.labels) if paths else given
            for path in paths:
                if path == "labels":
                    merged = dict(given)
                elif path.startswith(_LABEL_PATH):
                    label = path.removeprefix(_LABEL_PATH)
                    merged[label] = given.get(label, "")
                else:
                    raise InvalidArgument(f"cannot update {path[:100]!r} of a snapshot")
            merged = _without_empty(check_labels(merged))
            row = replace(row, labels=merged, updated=time.time_ns())
            changes.update(row)
            return row

    # Looking ---------------------------------------------------------------------------------

    def stat(self, key: str) -> Row:
        return self._ledger.get(key)

    def list(self, filters: Sequence[str]) -> list[Row]:
        """The rows that one of the filters matches; all without filters."""
        matches = parse_filters(filters)
        return [row for row in self._ledger.scan() if matches(row)]

    def usage(self, key: str) -> Usage:
        """Of a writable snapshot what it takes now, of a committed one what it took then."""
        row = self._ledger.get(key)
        if row.kind is Kind.VIEW or not row.has_directory:
            return row.usage or Usage(0, 0)
        if row.kind is Kind.ACTIVE:
            return self._directories.usage(row.id)
        return row.usage or self._measure(row)

    def _measure(self, row: Row) -> Usage:
        usage = self._directories.usage(row.id)
        with self._ledger.change() as changes:
            now = self._ledger.find(row.name)
            if now is not None and now.id == row.id:
                changes.update(replace(now, usage=usage))
        return usage

    def _measure_quietly(self, row: Row) -> None:
        """In the background, where nobody waits for an error; `usage` measures again."""
        try:
            self._measure(row)
        except ImgsnapError as error:
            _log.info("not measured: %r: %s", row.name, error)

    def cleanup(self) -> None:
        """Deletes what removed snapshots left and releases devices; cheap when there is nothing."""
        self._claims.release_unused()
        self._directories.empty_removed()


def _is_extraction(key: str, labels: Mapping[str, str]) -> bool:
    """Whether a layer is extracted into the snapshot, not a container run from it."""
    return TARGET in labels or key.rpartition("/")[2].startswith(_EXTRACTION)


def _without_empty(labels: Mapping[str, str]) -> dict[str, str]:
    """containerd stores no empty label: setting one to "" deletes it."""
    return {name: value for name, value in labels.items() if value}


def _set_owner(tree: Path, root: tuple[int, int] | None, lowers: tuple[Path, ...]) -> None:
    """The tree's own directory is the root of what is mounted: as the image's, or mapped."""
    if lowers:
        take_over(lowers[0], tree)
    if root is not None:
        os.chown(tree, *root)
