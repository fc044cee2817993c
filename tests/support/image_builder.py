"""OCI and Docker images for tests, from layer tars: layouts, archives, and their manifests.

Separate from the product's own manifest code on purpose: it writes the JSON by hand.
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zstandard

OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
SUFFIXES = {"": "", "gzip": "+gzip", "zstd": "+zstd"}
REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class LayerBlob:
    """A layer as a registry holds it; tests break one by replacing a field."""

    tar: bytes
    compression: str = ""  # "", gzip or zstd
    blob: bytes = b""  # in place of the compressed tar
    diff_id: str = ""  # in place of the tar's digest
    digest: str = ""  # in place of the blob's digest

    @property
    def data(self) -> bytes:
        if self.blob:
            return self.blob
        if self.compression == "gzip":
            return gzip.compress(self.tar, 1, mtime=0)
        if self.compression == "zstd":
            return zstandard.ZstdCompressor(level=1).compress(self.tar)
        return self.tar


@dataclass(frozen=True)
class Image:
    """An image of one platform; `run` is the config's `config` object."""

    layers: tuple[LayerBlob, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "amd64"
    variant: str = ""
    docker: bool = False  # Docker manifest v2 schema 2

    @property
    def platform(self) -> dict[str, str]:
        found = {"os": "linux", "architecture": self.architecture}
        return {**found, "variant": self.variant} if self.variant else found


@dataclass
class Blobs:
    """What a place holds: blobs by digest, with names for manifests."""

    by_digest: dict[str, bytes] = field(default_factory=dict)
    names: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def add(self, media_type: str, data: bytes, digest: str = "") -> dict[str, Any]:
        digest = digest or sha256(data)
        self.by_digest[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_image(self, image: Image) -> dict[str, Any]:
        """Returns the manifest's descriptor."""
        config = json.dumps(config_of(image)).encode()
        layers = []
        for layer in image.layers:
            kind = OCI + "layer.v1.tar" + SUFFIXES[layer.compression]
            if image.docker:
                dot = ".gzip" if layer.compression == "gzip" else ""
                kind = DOCKER + "image.rootfs.diff.tar" + dot
            layers.append(self.add(kind, layer.data, layer.digest))
        config_type = DOCKER + "container.image.v1+json" if image.docker else OCI + "config.v1+json"
        media_type = manifest_type(image)
        document = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.add(config_type, config),
            "layers": layers,
        }
        return self.add(media_type, json.dumps(document).encode())

    def add_index(self, images: Sequence[Image], *, docker: bool = False) -> dict[str, Any]:
        """Returns the index's descriptor."""
        kind = DOCKER + "distribution.manifest.list.v2+json" if docker else OCI + "index.v1+json"
        document = {
            "schemaVersion": 2,
            "mediaType": kind,
            "manifests": [{**self.add_image(i), "platform": i.platform} for i in images],
        }
        return self.add(kind, json.dumps(document).encode())

    def index_json(self) -> bytes:
        entries = [
            {**descriptor, "annotations": {REF_NAME: name}} if name else descriptor
            for name, descriptor in self.names
        ]
        return json.dumps({"schemaVersion": 2, "manifests": entries}).encode()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def manifest_type(image: Image) -> str:
    return DOCKER + "distribution.manifest.v2+json" if image.docker else OCI + "manifest.v1+json"


def config_of(image: Image) -> dict[str, Any]:
    diff_ids = [layer.diff_id or sha256(layer.tar) for layer in image.layers]
    return {
        **image.platform,
        "config": dict(image.run),
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }


def image(*tars: bytes, compression: str = "gzip", **options: Any) -> Image:
    """An image of whole layer tars."""
    return Image(tuple(LayerBlob(tar, compression) for tar in tars), **options)


def recompressed(source: Image, compression: str) -> Image:
    layers = tuple(replace(layer, compression=compression) for layer in source.layers)
    return replace(source, layers=layers)


def collect(content: Image | Sequence[Image], name: str = "latest") -> Blobs:
    """The blobs of an image, or of an index of images, under one name."""
    blobs = Blobs()
    descriptor = (
        blobs.add_image(content) if isinstance(content, Image) else blobs.add_index(content)
    )
    blobs.names.append((name, descriptor))
    return blobs


def _layout_files(blobs: Blobs) -> dict[str, bytes]:
    files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": blobs.index_json()}
    for digest, data in blobs.by_digest.items():
        files["blobs/sha256/" + digest.removeprefix("sha256:")] = data
    return files


def write_layout(path: Path, content: Image | Sequence[Image] | Blobs, name: str = "latest") -> str:
    """Writes an image layout; returns the digest of its (first) manifest."""
    blobs = content if isinstance(content, Blobs) else collect(content, name)
    for relative, data in _layout_files(blobs).items():
        file = path / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(blobs.names[0][1]["digest"])


def write_oci_archive(
    path: Path, content: Image | Sequence[Image] | Blobs, name: str = "latest"
) -> str:
    """Writes a tar of an image layout; returns the digest of its (first) manifest."""
    blobs = content if isinstance(content, Blobs) else collect(content, name)
    _write_tar(path, _layout_files(blobs))
    return str(blobs.names[0][1]["digest"])


def write_docker_archive(path: Path, content: Image, name: str = "test/app:1") -> None:
    """Writes what `docker save` writes: uncompressed layers and a manifest.json."""
    config = json.dumps(config_of(content)).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    files = {config_name: config}
    names = []
    for layer in content.layers:
        names.append(hashlib.sha256(layer.tar).hexdigest() + "/layer.tar")
        files[names[-1]] = layer.tar
    document = [{"Config": config_name, "RepoTags": [name], "Layers": names}]
    _write_tar(path, {**files, "manifest.json": json.dumps(document).encode()})


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
