"""The images to measure with, OCI layouts all: the corpus's, the demo's, and made-up ones."""

import hashlib
import json
import os
import platform
import random
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.processes import output_of
from harness.report import tell

DEMO_STATE = ROOT / ".demo"
"""Where `make demo` keeps its image too."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Image:
    """An image in an OCI layout directory."""

    name: str
    layout: Path
    tag: str = "latest"

    @property
    def source(self) -> str:
        return f"oci:{self.layout}:{self.tag}"

    def layers(self) -> list[dict[str, Any]]:
        """The layer descriptors of its manifest."""
        index = json.loads((self.layout / "index.json").read_text())
        manifest = json.loads(self.blob(index["manifests"][0]["digest"]).read_text())
        layers: list[dict[str, Any]] = manifest["layers"]
        return layers

    def blob(self, digest: str) -> Path:
        return self.layout / "blobs" / digest.replace(":", "/")

    def layer_files(self) -> list[Path]:
        return [self.blob(layer["digest"]) for layer in self.layers()]


def corpus_image(corpus: Path, name: str) -> Image | None:
    layout = corpus / name
    return Image(name, layout) if (layout / "index.json").exists() else None


def corpus_names(corpus: Path) -> list[str]:
    return sorted(path.parent.name for path in corpus.glob("*/index.json"))


def image_or_demo(corpus: Path, name: str) -> Image:
    """An image of the corpus, or else the project's demo image, built on the spot."""
    image = corpus_image(corpus, name)
    if image is not None:
        return image
    tell(f"there is no {name} in {corpus}: using the project's demo image")
    return demo_image()


def demo_image() -> Image:
    """The project's own image, of distribution packages; kept for the next run."""
    from demo.image import build

    layout = DEMO_STATE / "image"
    DEMO_STATE.mkdir(exist_ok=True)
    build(layout, DEMO_STATE / "work")
    return Image("demo", layout)


def layer_tar_size(path: Path) -> int:
    """Bytes of an uncompressed gzip layer, from its last four (modulo 4 GiB)."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path.stat().st_size
        file.seek(-4, os.SEEK_END)
        return int.from_bytes(file.read(4), "little")


def is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def flattened_tar(image: Image, work: Path) -> Path:
    """One sorted tar of the whole image, as `mksquashfs -tar` wants it.

    Times before 1970 become 1970: mksquashfs 4.5.1 gives up on them.
    """
    bundle, tar = work / "bundle", work / f"{image.name}.tar"
    try:
        output_of(["umoci", "unpack", "--image", f"{image.layout}:{image.tag}", bundle])
        early = ["find", bundle / "rootfs", "!", "-newermt", "@0"]
        output_of([*early, "-exec", "touch", "-h", "-d", "@0", "{}", "+"])
        command: list[str | Path] = ["tar", "--sort=name", "--numeric-owner", "--xattrs"]
        command += ["--xattrs-include=*", "-C", bundle / "rootfs", "-cf", tar, "."]
        output_of(command)
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    return tar


def large_file_image(layout: Path, mib: int, seed: int = 1) -> Image:
    """An image with one file of `mib` MiB, `large.bin`, that does not compress.

    Other bytes for each seed.
    """
    blobs = layout / "blobs/sha256"
    blobs.mkdir(parents=True)
    raw = layout / "large.bin"
    source = random.Random(seed)
    with raw.open("wb") as file:  # in pieces: our own size is the least RSS of our children
        for _ in range(mib):
            file.write(source.randbytes(1 << 20))
    tar_file = layout / "large.tar"
    with tarfile.open(tar_file, "w") as tar:
        tar.add(raw, "large.bin")
    raw.unlink()
    with tar_file.open("rb") as packed:
        digest = hashlib.file_digest(packed, "sha256").hexdigest()
    diff_id = f"sha256:{digest}"
    layer = {
        "mediaType": "application/vnd.oci.image.layer.v1.tar",
        "digest": diff_id,
        "size": tar_file.stat().st_size,
    }
    tar_file.rename(blobs / digest)
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _put_json(layout, config, "application/vnd.oci.image.config.v1+json"),
        "layers": [layer],
    }
    entry = _put_json(layout, manifest, str(manifest["mediaType"]))
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return Image("large", layout)


def _put_json(layout: Path, value: object, media_type: str) -> dict[str, Any]:
    return _put(layout, json.dumps(value).encode(), media_type)


def _put(layout: Path, data: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    directory = layout / "blobs/sha256"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / digest).write_bytes(data)
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}
