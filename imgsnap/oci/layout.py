"""A repository kept in an OCI image layout directory; the local store is one as well."""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import DigestMismatch, InvalidArgument
from imgsnap.oci import index_edit
from imgsnap.oci.layout_files import LayoutFiles, copy_all, translated, write_all
from imgsnap.oci.local_reader import LocalReader
from imgsnap.oci.manifest import Document, parse_document
from imgsnap.oci.media_types import REF_NAME
from imgsnap.oci.reference import check_layout_tag
from imgsnap.oci.repository import Descriptor, RawManifest, Repository
from imgsnap.units import MIB


class LayoutRepository(LocalReader):
    """Implements WritableRepository over an image layout. Thread and process safe.

    index.json has an entry for each name of a manifest, and one without a name for a manifest
    that has none or has lost its last: it may be somebody's referrer or a part of an index.

    Raises NotFound when there is no layout at `path` and `create` is False.
    """

    def __init__(self, path: Path, *, create: bool = False, verify: bool = True) -> None:
        self._layout = LayoutFiles(path, create=create)
        super().__init__(self._layout, verify=verify)
        if create:
            self._layout.remove_stale()

    @property
    def path(self) -> Path:
        """The layout's directory."""
        return self._layout.path

    def put_blob(self, descriptor: Descriptor, path: Path) -> None:
        """Takes a file in: by a hard link where possible, so the caller must not change it later.

        Else by a copy inside the kernel. Raises InvalidArgument when the file's size is not the
        descriptor's, ResourceExhausted when the disk is full.
        """
        with translated(path, f"{path}"):
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(source).st_size
            if size != descriptor.size:
                raise InvalidArgument(
                    f"{path} has {size} bytes, its descriptor says {descriptor.size}"
                )
            if path.is_symlink() or not self._layout.link(descriptor.digest, size, str(path)):
                self._layout.write(descriptor.digest, size, lambda target: copy_all(source, target))
        finally:
            os.close(source)

    def put_bytes(self, descriptor: Descriptor, data: bytes) -> None:
        """Stores bytes as a blob. Raises DigestMismatch when they are not the descriptor's."""
        got = sha256_digest(data)
        if got != descriptor.digest or len(data) != descriptor.size:
            raise DigestMismatch(f"blob for {self.name}", descriptor.digest, got)
        self._layout.write(descriptor.digest, len(data), lambda target: write_all(target, data))

    def mount_blob(self, descriptor: Descriptor, source: Repository) -> bool:
        """Links a blob of another layout, or copies it inside the kernel; False for others.

        The blob is hashed first: damage in one layout must not spread to the next. Raises
        DigestMismatch.
        """
        if not isinstance(source, LayoutRepository):
            return False
        files = source._layout
        fd = files.open_fd(descriptor.digest)
        if fd is None:
            return False
        try:
            if self.has_blob(descriptor):
                return True
            _check_file(fd, descriptor.digest, f"blob of {source.name}")
            if not self._layout.link_from(files, descriptor.digest, descriptor.size):
                self._layout.write(
                    descriptor.digest, descriptor.size, lambda target: copy_all(fd, target)
                )
        finally:
            os.close(fd)
        return True

    def put_manifest(
        self,
        manifest: RawManifest,
        tags: Sequence[str] = (),
        *,
        subject: Digest | None = None,
    ) -> None:
        """Stores a manifest and moves the names `tags` to it.

        Referrers are found by the `subject` inside the manifest; the argument adds nothing here.
        """
        for tag in tags:
            check_layout_tag(tag)
        document = parse_document(manifest.raw, record=f"manifest {manifest.descriptor.digest}")
        self.put_bytes(manifest.descriptor, manifest.raw)
        entry = _entry(manifest, document)

        def change(index: index_edit.Index) -> bool:
            before = list(index["manifests"])
            for tag in dict.fromkeys(tags):
                _move_name(index, entry, tag)
            if not index_edit.has_digest(index, entry.digest):
                index_edit.add(index, entry)
            _drop_nameless(index, entry.digest)
            return bool(index["manifests"] != before)

        self._layout.edit_index(change)

    def remove_tag(self, tag: str) -> bool:
        """Takes a name off its manifest; False when there is no such name. Blobs stay."""
        found = False

        def change(index: index_edit.Index) -> bool:
            nonlocal found
            removed = index_edit.remove_name(index, tag)
            _keep_listed(index, removed)
            found = bool(removed)
            return found

        self._layout.edit_index(change)
        return found

    # Garbage collection ----------------------------------------------------------------------

    @property
    def files(self) -> LayoutFiles:
        """The layout's files, for garbage collection."""
        return self._layout

    def listed(self) -> list[Descriptor]:
        """Every entry of index.json, named or not."""
        return list(self._index().manifests)

    def delete_manifests(self, digests: Collection[Digest]) -> None:
        """Takes every entry of these manifests out of index.json; blobs stay."""

        def change(index: index_edit.Index) -> bool:
            before = len(index["manifests"])
            index["manifests"] = [
                item for item in index["manifests"] if item["digest"] not in digests
            ]
            return len(index["manifests"]) != before

        self._layout.edit_index(change)


def _move_name(index: index_edit.Index, entry: Descriptor, tag: str) -> None:
    if index_edit.digests_named(index, tag) == [entry.digest]:
        return  # As it is: an entry may carry members that other tools added.
    removed = index_edit.remove_name(index, tag)
    index_edit.add(index, entry, ref_name=tag)
    _keep_listed(index, removed)


def _keep_listed(index: index_edit.Index, removed: list[dict[str, Any]]) -> None:
    """Puts entries back without their name, where it was the last of their manifest."""
    for old in removed:
        if index_edit.has_digest(index, old["digest"]):
            continue
        annotations = {key: text for key, text in old["annotations"].items() if key != REF_NAME}
        nameless = {key: value for key, value in old.items() if key != "annotations"}
        if annotations:
            nameless["annotations"] = annotations
        index["manifests"].append(nameless)


def _check_file(fd: int, digest: Digest, what: str) -> None:
    sha256 = hashlib.sha256()
    position = 0
    while data := os.pread(fd, MIB, position):
        sha256.update(data)
        position += len(data)
    got = "sha256:" + sha256.hexdigest()
    if got != digest:
        raise DigestMismatch(what, digest, got, hint="the layout is damaged; copy it again")


def _entry(manifest: RawManifest, document: Document) -> Descriptor:
    """The entry of index.json, with the artifact type that `oras` and podman look for there."""
    return Descriptor(
        document.media_type,
        manifest.descriptor.digest,
        len(manifest.raw),
        artifact_type=document.artifact_type,
    )


def _drop_nameless(index: index_edit.Index, digest: Digest) -> None:
    """Removes nameless entries of a manifest that has a named one."""
    named = any(
        item["digest"] == digest and index_edit.ref_name(item) for item in index["manifests"]
    )
    if named:
        index["manifests"] = [
            item
            for item in index["manifests"]
            if item["digest"] != digest or index_edit.ref_name(item)
        ]
