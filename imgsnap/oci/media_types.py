"""Media types: OCI image-spec 1.1, Docker image manifest v2 schema 2, and ours."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER_TAR = "application/vnd.oci.image.layer.v1.tar"

DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_SCHEMA1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)
"""Recognised only to be refused: schema 1 has no config and no sizes."""

ARTIFACT_SNAPSHOT = "application/vnd.imgsnap.snapshot.v1+json"
ARTIFACT_LAYER = "application/vnd.imgsnap.layer.v1+json"
ARTIFACT_BOOT_PACK = "application/vnd.imgsnap.boot-pack.v1+json"
CONFIG = "application/vnd.imgsnap.config.v1+json"
EROFS_METADATA = "application/vnd.imgsnap.erofs-metadata.v1+zstd"
CHUNK_MAP = "application/vnd.imgsnap.chunk-map.v1+zstd"
PACK = "application/vnd.imgsnap.pack.v1"
BOOT_PACK = "application/vnd.imgsnap.boot-pack.v1"
BLOCK_HASHES = "application/vnd.imgsnap.block-hashes.v1"
LAYER_INDEX = "application/vnd.imgsnap.layer-index.v1+zstd"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
IMAGE_CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})

MANIFEST_ACCEPT = ", ".join((OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX))
"""The Accept header of a manifest request; without it registries fall back to schema 1."""

LAYER_TAG_PREFIX = "imgsnap-layer-"
"""Tags of converted layers begin so; users never mean one of them."""

REF_NAME = "org.opencontainers.image.ref.name"
"""The annotation that names an entry of an image layout's index.json (image-spec, annotations)."""
