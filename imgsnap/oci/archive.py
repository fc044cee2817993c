"""Read-only repositories inside tar files: ``oci-archive:`` and ``docker-archive:``.

Nothing is extracted: blobs are read at their offsets in the tar.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgsnap.digest import Digest, digest_hex, parse_digest, sha256_digest
from imgsnap.errors import (
    FormatError,
    InvalidArgument,
    InvalidReference,
    LimitExceeded,
    NotFound,
    Unsupported,
)
from imgsnap.oci.blob_files import BlobFile, DescriptorFile, MemoryFile
from imgsnap.oci.layout_files import INDEX_SIZE_MAX, LAYOUT_VERSION, translated
from imgsnap.oci.local_reader import NAMES_SHOWN_MAX, LocalReader
from imgsnap.oci.manifest import (
    LAYERS_MAX,
    ImageIndex,
    ImageManifest,
    document_bytes,
    parse_json_object,
    raw_manifest,
)
from imgsnap.oci.media_types import OCI_CONFIG, OCI_LAYER_TAR, OCI_MANIFEST, REF_NAME
from imgsnap.oci.reference import normalize_docker_name
from imgsnap.oci.repository import MANIFEST_SIZE_MAX, Descriptor, RawManifest
from imgsnap.oci.tar_index import TarIndex, TarMember, compression_of, read_tar_index

IMAGES_MAX = 10_000
"""Images of one docker-archive; `docker save` of a whole machine has hundreds."""


class _TarFiles:
    """An open tar with its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with translated(path, str(path)):
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with translated(path, str(path)):
                self.members: TarIndex = read_tar_index(self.fd, path)
        except BaseException:
            os.close(self.fd)
            raise

    def small(self, name: str, size_max: int) -> bytes:
        """A small member's bytes. Raises NotFound or LimitExceeded."""
        member = self.members.find(name)
        if member is None:
            raise NotFound(f"{self.path} holds no {name[:200]}")
        where = f"{self.path}: {name[:200]}"
        if member.size > size_max:
            raise LimitExceeded("oci.archive_record_size_max", member.size, size_max, where=where)
        return self.file(member).read_at(0, member.size)

    def file(self, member: TarMember) -> DescriptorFile:
        """A member as a blob file, which shares the tar's descriptor."""
        what = f"{self.path}: {member.name}"
        return DescriptorFile(self.fd, member.offset, member.size, what, owned=False)

    def close(self) -> None:
        """Closes the tar, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _OciArchiveFiles:
    """BlobFiles over a tar of an OCI image layout."""

    def __init__(self, path: Path) -> None:
        self._tar = _TarFiles(path)
        try:
            record = f"{self.name} oci-layout"
            marker = parse_json_object(self._tar.small("oci-layout", 4096), record=record)
            version = marker.get("imageLayoutVersion")
            if version != LAYOUT_VERSION:
                raise Unsupported(f"{path}: image layout version {str(version)[:40]!r}")
        except BaseException:
            self._tar.close()
            raise

    @property
    def name(self) -> str:
        return f"oci-archive:{self._tar.path}"

    def index(self) -> bytes:
        return self._tar.small("index.json", INDEX_SIZE_MAX)

    def find(self, digest: Digest) -> BlobFile | None:
        member = self._tar.members.find(f"blobs/sha256/{digest_hex(digest)}")
        return None if member is None else self._tar.file(member)

    def close(self) -> None:
        self._tar.close()


class OciArchiveRepository(LocalReader):
    """Implements Repository over a tar of an OCI image layout (`skopeo copy … oci-archive:`).

    Raises NotFound when the tar is no layout, Unsupported when it is compressed.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        super().__init__(_OciArchiveFiles(path), verify=verify)


class _DockerArchiveFiles:
    """BlobFiles over the output of `docker save`, as a layout made up from its manifest.json."""

    def __init__(self, path: Path) -> None:
        self._tar = _TarFiles(path)
        self._blobs: dict[Digest, BlobFile] = {}
        try:
            entries: list[Descriptor] = []
            for number, image in enumerate(self._images()):
                entries.extend(self._add_image(image, f"{self.name} manifest.json[{number}]"))
            self._index = document_bytes(ImageIndex(tuple(entries)))
        except BaseException:
            self._tar.close()
            raise

    @property
    def name(self) -> str:
        return f"docker-archive:{self._tar.path}"

    def index(self) -> bytes:
        return self._index

    def find(self, digest: Digest) -> BlobFile | None:
        return self._blobs.get(digest)

    def close(self) -> None:
        self._tar.close()

    def _images(self) -> list[Any]:
        raw = self._tar.small("manifest.json", INDEX_SIZE_MAX)
        # The file is a list; wrapped, it goes through the one hardened JSON parser.
        record = f"{self.name} manifest.json"
        wrapped = parse_json_object(b'{"images":' + raw + b"}", record=record, size_max=17 << 20)
        images = wrapped.get("images")
        if not isinstance(images, list) or len(wrapped) != 1:
            raise FormatError(record, "document", 0, "is not a list")
        if len(images) > IMAGES_MAX:
            raise LimitExceeded("oci.archive_images_max", len(images), IMAGES_MAX, where=record)
        return images

    def _add_image(self, image: Any, record: str) -> list[Descriptor]:
        if not isinstance(image, dict):
            raise FormatError(record, "document", 0, "is not an object")
        config = self._tar.small(_string(image.get("Config"), record, "Config"), MANIFEST_SIZE_MAX)
        layers = _strings(image.get("Layers"), record, "Layers")
        diff_ids = _diff_ids(config, f"{record}: config")
        if len(layers) != len(diff_ids):
            raise FormatError(
                record, "Layers", 0, f"lists {len(layers)}, the config {len(diff_ids)} diff_ids"
            )
        descriptors = [
            self._add_layer(name, diff_id, record)
            for name, diff_id in zip(layers, diff_ids, strict=True)
        ]
        config_digest = sha256_digest(config)
        self._blobs[config_digest] = MemoryFile(config)
        manifest = raw_manifest(
            ImageManifest(Descriptor(OCI_CONFIG, config_digest, len(config)), tuple(descriptors))
        )
        digest = manifest.descriptor.digest
        self._blobs[digest] = MemoryFile(manifest.raw)
        names = _strings(image.get("RepoTags") or [], record, "RepoTags")
        labels: list[Mapping[str, str]] = [{REF_NAME: name} for name in names] or [{}]
        size = len(manifest.raw)
        return [Descriptor(OCI_MANIFEST, digest, size, label) for label in labels]

    def _add_layer(self, name: str, diff_id: Digest, record: str) -> Descriptor:
        member = self._tar.members.find(name)
        if member is None:
            raise FormatError(record, "Layers", 0, f"{name[:200]!r} is not in the archive")
        file = self._tar.file(member)
        compression = compression_of(file.read_at(0, min(member.size, 16)))
        if compression is not None:
            # Its digest is not the diffID, and nothing in the archive says what it is.
            raise Unsupported(
                f"{record}: layer {name[:200]} is compressed with {compression[0]}",
                hint=f"convert it: skopeo copy {self.name} oci-archive:NEW.tar:NAME",
            )
        self._blobs[diff_id] = file
        return Descriptor(OCI_LAYER_TAR, diff_id, member.size)


class DockerArchiveRepository(LocalReader):
    """Implements Repository over the output of `docker save`.

    Manifests are made up: each layer's digest is its diffID from the config, NOT verified until
    the layer is read and hashed by the caller. Names match in every spelling that docker takes
    for the same image (``x:1``, ``docker.io/library/x:1``).

    Raises NotFound without a manifest.json, FormatError, or Unsupported for compressed layers.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        super().__init__(_DockerArchiveFiles(path), verify=verify)

    def manifest(self, reference: str) -> RawManifest:
        """The made-up manifest of an image. Raises InvalidReference listing the names there are."""
        try:
            return super().manifest(reference)
        except NotFound:
            if reference.startswith("sha256:"):
                raise
        names = self.tags()
        for name in names:
            if normalize_docker_name(name) == normalize_docker_name(reference):
                return super().manifest(name)
        shown = ", ".join(names[:NAMES_SHOWN_MAX]) or "none with a name"
        raise InvalidReference(f"{self.name} has no image {reference[:300]!r}: it has {shown}")


def _diff_ids(config: bytes, record: str) -> list[Digest]:
    rootfs = parse_json_object(config, record=record).get("rootfs")
    if not isinstance(rootfs, dict):
        raise FormatError(record, "rootfs", 0, "is missing or not an object")
    try:
        texts = _strings(rootfs.get("diff_ids"), record, "rootfs.diff_ids")
        return [parse_digest(text, what="rootfs.diff_ids") for text in texts]
    except InvalidArgument as error:
        raise FormatError(record, "rootfs.diff_ids", 0, str(error)) from error


def _strings(value: object, record: str, name: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise FormatError(record, name, 0, "is not a list")
    if len(value) > LAYERS_MAX:
        raise LimitExceeded("oci.layers_max", len(value), LAYERS_MAX, where=f"{record}: {name}")
    return [_string(item, record, name) for item in value]


def _string(value: object, record: str, name: str) -> str:
    if not isinstance(value, str) or not value.isprintable() or len(value) > 4096:
        raise FormatError(record, name, 0, "is missing, not a string, or not printable")
    return value
