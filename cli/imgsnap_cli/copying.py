"""push and pull: one snapshot from one place to another, bytes unchanged."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imgsnap.errors import NotFound
from imgsnap_cli.places import Places
from imgsnap_cli.progress import make_progress
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.resolve import Admit
    from imgsnap.digest import Digest
    from imgsnap.oci.repository import RawManifest, Repository


def copy(
    settings: Settings,
    flags: dict[str, Any],
    source: str,
    target: str,
    progress: str,
    admit: "Admit | None" = None,
) -> None:
    """Copies a snapshot, or an index of snapshots; tags it when everything has arrived. Boot packs
    go with it, the newest of each name, and signatures.

    With `admit` only what that accepts: of an index all. A source that is an image with a snapshot,
    or a converted image, stands for that snapshot.
    """
    from imgsnap.blockstore.snapshot_manifest import stands_for
    from imgsnap.convert.publish import held_snapshot
    from imgsnap.oci.manifest import ImageManifest, parse_document
    from imgsnap.oci.media_types import ARTIFACT_SNAPSHOT
    from imgsnap.oci.transfer import copy_document, total_size

    places = Places(settings, flags)
    work = Path(settings.environ.get("TMPDIR") or "/var/tmp")  # noqa: S108
    with ExitStack() as stack:
        origin, asked = places.reader(stack, source)
        destination, tag = places.writer(stack, target)
        held_snapshot(destination, tag)  # refuses to replace an image
        raw = origin.manifest(asked)
        reference = raw.descriptor.digest
        document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
        named = stands_for(document) if isinstance(document, ImageManifest) else None
        if named is not None:
            reference = named
        elif document.artifact_type != ARTIFACT_SNAPSHOT:
            found = origin.referrers(raw.descriptor.digest, ARTIFACT_SNAPSHOT)
            if not found:
                raise NotFound(
                    f"{source} is neither a snapshot nor an image that has one",
                    hint=f"make one: imgsnap convert {source} {target}",
                )
            reference = min(entry.digest for entry in found)
        if admit is not None:
            _admit(origin, asked, raw, reference, admit)
        watcher = make_progress(progress)
        label = raw.descriptor.digest[7:19]
        watcher.stage(label, "copy", total_size(origin, reference))
        copied = copy_document(
            origin, destination, reference, tag, work, lambda count: watcher.advance(label, count)
        )
        for pack in _boot_packs(origin, copied):
            copy_document(origin, destination, pack, None, work)
        for digest, name in _signatures(origin, copied):
            if name is None or not _is_there(destination, name):  # who signed there counts there
                copy_document(origin, destination, digest, name, work)
        watcher.done(label, "copied")
    click.echo(f"{target}@{copied.descriptor.digest}")


def _admit(
    origin: "Repository", asked: str, raw: "RawManifest", chosen: "Digest", admit: "Admit"
) -> None:
    """`asked` led to `raw`, and `chosen` is what is copied of it."""
    from imgsnap.blockstore.snapshot_manifest import stands_for
    from imgsnap.oci.manifest import ImageIndex, parse_document

    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        for entry in document.manifests:
            admit(origin, asked, (origin.manifest(entry.digest), raw))
    elif chosen == raw.descriptor.digest:
        admit(origin, asked, (raw,))
    else:
        snapshot, committed = origin.manifest(chosen), stands_for(document) == chosen
        admit(origin, asked, (snapshot, raw) if committed else (snapshot,))


def _signatures(origin: "Repository", raw: "RawManifest") -> "Iterator[tuple[Digest, str | None]]":
    """The manifests of signatures of what was copied, with their tags if they have any."""
    from imgsnap.oci.manifest import ImageIndex, parse_document
    from imgsnap.trust.find import signature_manifests

    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    entries = document.manifests if isinstance(document, ImageIndex) else ()
    for digest in (raw.descriptor.digest, *(entry.digest for entry in entries)):
        yield from signature_manifests(origin, digest)


def _is_there(repository: "Repository", tag: str) -> bool:
    try:
        repository.manifest(tag)
    except NotFound:
        return False
    return True


def _boot_packs(origin: "Repository", raw: "RawManifest") -> "Iterator[Digest]":
    """The manifests of the boot packs of a snapshot, or of all snapshots of an index."""
    from imgsnap.blockstore.boot_choice import boot_packs
    from imgsnap.oci.manifest import ImageIndex, parse_document

    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    entries = document.manifests if isinstance(document, ImageIndex) else (raw.descriptor,)
    for entry in entries:
        for pack in boot_packs(origin, entry.digest):
            yield pack.manifest
