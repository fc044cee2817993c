"""A repository kept in an OCI image layout directory; the local store is one as well."""

import os
from collections.abc import Sequence
from pathlib import Path

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import DigestMismatch, InvalidArgument
from imgsnap.oci import index_edit
from imgsnap.oci.layout_files import LayoutFiles, copy_all, translated, write_all
from imgsnap.oci.local_reader import LocalReader
from imgsnap.oci.manifest import Document, parse_document
from imgsnap.oci.media_types import OCI_MANIFEST, REF_NAME
from imgsnap.oci.reference import check_layout_tag
from imgsnap.oci.repository import Descriptor, RawManifest, Repository


class LayoutRepository(LocalReader):
    """Implements WritableRepository over an image layout. Thread and process safe.

    A manifest gets an entry of index.json for each of its names. Without a name it gets one
    only when it has a subject, because nothing else would lead to a referrer; a manifest that
    is a part of an index is found through the index.

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
        """Copies a file in, by shared blocks where the file system can.

        Raises InvalidArgument when its size is not the descriptor's, ResourceExhausted.
        """
        with translated(path, f"{path}"):
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(source).st_size
            if size != descriptor.size:
                raise InvalidArgument(
                    f"{path} has {size} bytes, its descriptor says {descriptor.size}"
                )
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
        """Links a blob of another layout, or copies it inside the kernel; False for others."""
        if not isinstance(source, LayoutRepository):
            return False
        files = source._layout
        if self._layout.link_from(files, descriptor.digest, descriptor.size):
            return True
        fd = files.open_fd(descriptor.digest)
        if fd is None:
            return False
        try:
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

        `subject` defaults to the manifest's own. A referrer that loses its last name stays
        listed without one.
        """
        for tag in tags:
            check_layout_tag(tag)
        document = parse_document(manifest.raw, record=f"manifest {manifest.descriptor.digest}")
        self.put_bytes(manifest.descriptor, manifest.raw)
        entry = _entry(manifest, document)
        listed = subject is not None or document.subject is not None

        def change(index: index_edit.Index) -> bool:
            before = list(index["manifests"])
            for tag in dict.fromkeys(tags):
                self._move_name(index, entry, tag)
            if tags or listed:
                _drop_nameless(index, entry.digest)
            if listed and not index_edit.has_digest(index, entry.digest):
                index_edit.add(index, entry)
            return bool(index["manifests"] != before)

        if tags or listed:
            self._layout.edit_index(change)

    def remove_tag(self, tag: str) -> bool:
        """Takes a name off its manifest; False when there is no such name. Blobs stay."""
        found = False

        def change(index: index_edit.Index) -> bool:
            nonlocal found
            removed = index_edit.remove_name(index, tag)
            self._keep_referrers(index, removed)
            found = bool(removed)
            return found

        self._layout.edit_index(change)
        return found

    def _move_name(self, index: index_edit.Index, entry: Descriptor, tag: str) -> None:
        if index_edit.digests_named(index, tag) == [entry.digest]:
            return  # As it is: an entry may carry members that other tools added.
        removed = index_edit.remove_name(index, tag)
        index_edit.add(index, entry, ref_name=tag)
        self._keep_referrers(index, removed)

    def _keep_referrers(self, index: index_edit.Index, removed: list[dict[str, object]]) -> None:
        for old in removed:
            digest = Digest(str(old["digest"]))
            if index_edit.has_digest(index, digest):
                continue
            described = Descriptor(str(old.get("mediaType") or OCI_MANIFEST), digest, 0)
            if self._referrer(described)[0] is not None:
                annotations = old.get("annotations")
                if isinstance(annotations, dict):
                    annotations.pop(REF_NAME, None)
                    if not annotations:
                        del old["annotations"]
                index["manifests"].append(old)


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
