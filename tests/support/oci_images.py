"""Small images and artefacts as OCI documents, and clients of scripted registries."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from imgsnap.digest import sha256_digest
from imgsnap.oci import media_types
from imgsnap.oci.auth import Authenticator
from imgsnap.oci.connections import ConnectionOptions
from imgsnap.oci.credentials import CredentialSource
from imgsnap.oci.manifest import ImageManifest, canonical_json, raw_manifest
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.repository import Descriptor, RawManifest, WritableRepository
from imgsnap.oci.retry import RetryPolicy
from imgsnap.oci.transport import Transport

SUBJECT_TYPE = media_types.OCI_MANIFEST


def descriptor_of(data: bytes, media_type: str = "application/octet-stream") -> Descriptor:
    """The descriptor of some bytes."""
    return Descriptor(media_type, sha256_digest(data), len(data))


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """A tar of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def push_image(repository: WritableRepository, tag: str, text: bytes = b"hello") -> RawManifest:
    """An image with one plain tar layer."""
    layer = tar_of({"file": text})
    config = canonical_json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [sha256_digest(layer)]},
        }
    )
    described = [
        descriptor_of(config, media_types.OCI_CONFIG),
        descriptor_of(layer, media_types.OCI_LAYER_TAR),
    ]
    repository.put_bytes(described[0], config)
    repository.put_bytes(described[1], layer)
    manifest = raw_manifest(ImageManifest(described[0], (described[1],)))
    repository.put_manifest(manifest, [tag])
    return manifest


def artifact(
    repository: WritableRepository, subject: RawManifest | None, text: bytes = b"pack"
) -> RawManifest:
    """Uploads the blobs of a snapshot artefact; the manifest is the caller's to put."""
    blobs = [
        (b'{"v":1}', media_types.CONFIG),
        (b"erofs metadata", media_types.EROFS_METADATA),
        (b"chunk map", media_types.CHUNK_MAP),
        (text, media_types.PACK),
    ]
    for data, media_type in blobs:
        repository.put_bytes(descriptor_of(data, media_type), data)
    config, *layers = [descriptor_of(data, media_type) for data, media_type in blobs]
    return raw_manifest(
        ImageManifest(
            config,
            tuple(layers),
            subject=subject.descriptor if subject else None,
            artifact_type=media_types.ARTIFACT_SNAPSHOT,
            annotations={"io.imgsnap.note": "größer"},
        )
    )


class FakeTime:
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    def clock(self) -> float:
        return self.now_s


def transport_to(
    host: str,
    *,
    time: FakeTime | None = None,
    options: ConnectionOptions | None = None,
    auth_file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    attempts_max: int = 4,
) -> Transport:
    """A transport whose waits take no time."""
    time = time or FakeTime()
    retry = RetryPolicy(attempts_max=attempts_max, sleep=time.sleep, clock=time.clock)
    credentials = CredentialSource(environ or {}, auth_file)
    return Transport(
        host,
        Authenticator(credentials, clock=time.clock),
        options or ConnectionOptions(plain_http=True),
        environ=environ or {},
        retry=retry,
    )


def repository_at(host: str, name: str = "team/app", **settings: object) -> RegistryRepository:
    """A repository of a scripted registry; `settings` as for transport_to."""
    return RegistryRepository(transport_to(host, **settings), name, owns_transport=True)  # type: ignore[arg-type]
