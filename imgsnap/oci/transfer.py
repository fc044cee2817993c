"""Moving blobs and manifests between repositories of any kind, bytes unchanged."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.digest import Digest
from imgsnap.errors import DigestMismatch
from imgsnap.oci.manifest import ImageIndex, ImageManifest, parse_document
from imgsnap.oci.repository import Descriptor, RawManifest, Repository, WritableRepository
from imgsnap.units import MIB


def _ignore(size: int) -> None:
    """Progress that nobody watches."""


def copy_blob(
    source: Repository,
    target: WritableRepository,
    descriptor: Descriptor,
    work_dir: Path,
    advance: Callable[[int], None] = _ignore,
) -> int:
    """Makes the target hold a blob of the source; verified on the way.

    Returns the bytes that moved through this process: 0 when the target had it or could take it
    from the source itself.
    """
    if target.has_blob(descriptor) or target.mount_blob(descriptor, source):
        advance(descriptor.size)
        return 0
    with TemporaryDirectory(dir=work_dir, prefix="blob-") as directory:
        path = Path(directory) / "blob"
        sha256 = hashlib.sha256()
        with source.open_blob(descriptor) as stream, path.open("wb") as file:
            while data := stream.read(MIB):
                sha256.update(data)
                file.write(data)
                advance(len(data))
        got = "sha256:" + sha256.hexdigest()
        if got != descriptor.digest:
            raise DigestMismatch(f"{source.name}: blob", descriptor.digest, got)
        target.put_blob(descriptor, path)
    return descriptor.size


def copy_document(
    source: Repository,
    target: WritableRepository,
    reference: str,
    tag: str | None,
    work_dir: Path,
    advance: Callable[[int], None] = _ignore,
) -> RawManifest:
    """Copies a manifest with its blobs, or an index with its manifests; tags it last.

    Nothing becomes visible under `tag` before everything that it needs is there.
    """
    raw = source.manifest(reference)
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        for entry in document.manifests:
            copy_document(source, target, entry.digest, None, work_dir, advance)
    else:
        for blob in blobs_of(document):
            copy_blob(source, target, blob, work_dir, advance)
    subject: Digest | None = document.subject.digest if document.subject else None
    target.put_manifest(raw, [tag] if tag else [], subject=subject)
    return raw


def blobs_of(manifest: ImageManifest) -> list[Descriptor]:
    """The config and the layers, each digest once."""
    found = {blob.digest: blob for blob in (manifest.config, *manifest.layers)}
    return list(found.values())


def total_size(source: Repository, reference: str) -> int:
    """Bytes of all blobs that `copy_document` would look at."""
    raw = source.manifest(reference)
    document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
    if isinstance(document, ImageIndex):
        return sum(total_size(source, entry.digest) for entry in document.manifests)
    return sum(blob.size for blob in blobs_of(document))
