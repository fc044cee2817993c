"""Snapshots made by mkfs.erofs instead of our converter: an independent judge of the loader."""

import base64
import hashlib
import itertools
import json
import os
import random
import subprocess
from array import array
from dataclasses import dataclass, field, replace
from pathlib import Path

from imgsnap.digest import Digest, chunk_id, sha256_digest
from imgsnap.formats import block_tree
from imgsnap.formats.chunk_map import ZERO_PACK, ChunkMap, Extent, PackRef
from imgsnap.formats.chunk_map_codec import encode
from imgsnap.formats.frame import compress
from imgsnap.formats.rules import Rules
from imgsnap.formats.snapshot_config import (
    DeviceExtent,
    ExtentConfig,
    SnapshotConfig,
    VerityConfig,
)
from imgsnap.oci.media_types import ARTIFACT_SNAPSHOT as SNAPSHOT_TYPE
from imgsnap.oci.media_types import CHUNK_MAP as CHUNK_MAP_TYPE
from imgsnap.oci.media_types import CONFIG as CONFIG_TYPE
from imgsnap.oci.media_types import EROFS_METADATA as METADATA_TYPE
from imgsnap.oci.media_types import OCI_CONFIG as IMAGE_CONFIG_TYPE
from imgsnap.oci.media_types import PACK as PACK_TYPE
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.units import BLOCK_SIZE, KIB
from tests.support.verity import naive_tree

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


@dataclass(frozen=True)
class BuiltSnapshot:
    """A snapshot's blobs, and the device it must present."""

    manifest: RawManifest
    blobs: dict[Digest, bytes] = field(repr=False)
    device: bytes = field(repr=False)
    config: SnapshotConfig = field(repr=False)
    chunk_map: ChunkMap = field(repr=False)
    packs: tuple[Digest, ...]

    @property
    def digest(self) -> Digest:
        return self.manifest.descriptor.digest


def make_tree(root: Path, *, seed: int = 1, files: int = 40) -> Path:
    """A directory tree with small, large, sparse, empty, linked and oddly named files."""
    rng = random.Random(seed)
    (root / "etc/conf.d").mkdir(parents=True)
    (root / "usr/lib").mkdir(parents=True)
    for number in range(files):
        size = rng.choice((0, 1, 100, 4095, 4096, 4097, 30_000, 150_000))
        (root / f"usr/lib/module{number:03}.py").write_bytes(_compressible(rng, size))
    (root / "usr/lib/big.bin").write_bytes(rng.randbytes(1_500_000) + _compressible(rng, 1_000_000))
    (root / "usr/lib/zeros").write_bytes(bytes(700_000))
    (root / "etc/conf.d/na\u00efve name").write_text("x=1\n")
    os.symlink("../usr/lib/big.bin", root / "etc/link")
    os.link(root / "usr/lib/big.bin", root / "etc/hardlink")
    return root


def _compressible(rng: random.Random, size: int) -> bytes:
    words = [rng.randbytes(6).hex().encode() for _ in range(40)]
    out = b" ".join(rng.choice(words) for _ in range(size // 12 + 1))
    return out[:size]


def erofs_image(tree: Path, image: Path) -> bytes:
    """The bytes of an uncompressed EROFS image of `tree`."""
    command = ["mkfs.erofs", "-T0", "-Enoinline_data", str(image), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    data = image.read_bytes()
    return data + bytes(-len(data) % BLOCK_SIZE)


def build_snapshot(
    device: bytes,
    *,
    extents: int = 2,
    metadata_blocks: int = 1,
    chunk_blocks: tuple[int, ...] = (16, 32, 8),
    packs: int = 2,
    created: str = "",
    architecture: str = "amd64",
    subject: Descriptor | None = None,
    embedded: bool = False,
    verity: bool = False,
) -> BuiltSnapshot:
    """Cuts a device into metadata, extents and chunks of the given block counts in turn; the
    manifest has the small parts in it when they are to be `embedded`. With `verity` a hash tree
    follows, in a pack of its own."""
    blobs: dict[Digest, bytes] = {}
    region = device[: metadata_blocks * BLOCK_SIZE]
    total = len(device) // BLOCK_SIZE
    cuts = [metadata_blocks + (total - metadata_blocks) * n // extents for n in range(extents + 1)]
    buffers = [bytearray() for _ in range(packs)]
    pieces = [
        _extent(device, first, last, chunk_blocks, number % packs, buffers[number % packs])
        for number, (first, last) in enumerate(itertools.pairwise(cuts))
    ]
    while buffers and not buffers[-1]:  # only zero chunks: an empty blob is no pack
        buffers.pop()
    root_hash = None
    if verity:
        area, root_hash = naive_tree(device, bytes(16))
        buffers.append(bytearray())
        device += area
        last = len(device) // BLOCK_SIZE
        tree = _extent(device, total, last, chunk_blocks, len(buffers) - 1, buffers[-1])
        pieces.append(replace(tree, diff_id=Digest(f"sha256:{root_hash}")))
    refs = tuple(PackRef(sha256_digest(bytes(b)), len(b)) for b in buffers)
    pack_layers = [_add(blobs, PACK_TYPE, bytes(buffer)) for buffer in buffers]
    chunk_map = ChunkMap(refs, tuple(pieces))
    config = _config(region, total, metadata_blocks, chunk_map, architecture, root_hash)
    layers = [
        _add(blobs, METADATA_TYPE, compress(region, 3)),
        _add(blobs, CHUNK_MAP_TYPE, compress(encode(chunk_map), 3)),
        *pack_layers,
        _add(blobs, IMAGE_CONFIG_TYPE, b'{"config":{}}'),
    ]
    first = _add(blobs, CONFIG_TYPE, config.to_json())
    if embedded:
        first, layers = _embed(first, blobs), [_embed(layer, blobs) for layer in layers]
    raw = manifest_json(first, layers, created, subject, root_hash=root_hash)
    annotations = {"org.opencontainers.image.created": created} if created else {}
    descriptor = Descriptor(
        MANIFEST_TYPE, sha256_digest(raw), len(raw), annotations, artifact_type=SNAPSHOT_TYPE
    )
    manifest = RawManifest(descriptor, raw)
    digests = tuple(ref.digest for ref in refs)
    return BuiltSnapshot(manifest, blobs, device, config, chunk_map, digests)


def manifest_json(
    config: Descriptor,
    layers: list[Descriptor],
    created: str = "",
    subject: Descriptor | None = None,
    artifact_type: str = SNAPSHOT_TYPE,
    root_hash: str | None = None,
) -> bytes:
    value: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifact_type,
        "config": _json(config),
        "layers": [_json(layer) for layer in layers],
    }
    annotations = {"org.opencontainers.image.created": created} if created else {}
    if root_hash is not None:
        annotations["io.imgsnap.verity.roothash"] = root_hash
    if annotations:
        value["annotations"] = annotations
    if subject is not None:
        value["subject"] = _json(subject)
    return json.dumps(value).encode()


def index_manifest(entries: list[tuple[Descriptor, str]]) -> RawManifest:
    """An index of snapshots, each with an architecture."""
    manifests = []
    for descriptor, architecture in entries:
        entry = _json(descriptor) | {"platform": {"os": "linux", "architecture": architecture}}
        manifests.append(entry | {"artifactType": descriptor.artifact_type})
    raw = json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}).encode()
    return RawManifest(Descriptor(INDEX_TYPE, sha256_digest(raw), len(raw)), raw)


def _json(descriptor: Descriptor) -> dict[str, object]:
    value: dict[str, object] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if descriptor.data:
        value["data"] = base64.b64encode(descriptor.data).decode()
    return value


def _embed(descriptor: Descriptor, blobs: dict[Digest, bytes]) -> Descriptor:
    small = descriptor.media_type != PACK_TYPE
    return replace(descriptor, data=blobs[descriptor.digest]) if small else descriptor


def _add(blobs: dict[Digest, bytes], media_type: str, data: bytes) -> Descriptor:
    digest = sha256_digest(data)
    blobs[digest] = data
    return Descriptor(media_type, digest, len(data))


def _extent(
    device: bytes, first: int, last: int, sizes: tuple[int, ...], pack: int, buffer: bytearray
) -> Extent:
    ids = bytearray()
    columns = {name: array(code) for name, code in zip("bpol", "HHII", strict=True)}
    block, turn = first, 0
    while block < last:
        count = min(sizes[turn % len(sizes)], last - block)
        data = device[block * BLOCK_SIZE : (block + count) * BLOCK_SIZE]
        ids += chunk_id(data)
        columns["b"].append(count)
        zeros = not any(data)
        frame = b"" if zeros else compress(data, 3)
        columns["p"].append(ZERO_PACK if zeros else pack)
        columns["o"].append(0 if zeros else len(buffer))
        columns["l"].append(len(frame))
        buffer += frame
        block, turn = block + count, turn + 1
    diff_id = Digest("sha256:" + hashlib.sha256(b"layer" + bytes(ids)).hexdigest())
    root = block_tree.build(block_tree.leaves(device[first * BLOCK_SIZE : last * BLOCK_SIZE]))[-1][
        0
    ]
    return Extent(
        diff_id,
        last - first,
        root,
        bytes(ids),
        columns["b"],
        columns["p"],
        columns["o"],
        columns["l"],
    )


def _config(
    region: bytes,
    total: int,
    metadata_blocks: int,
    chunk_map: ChunkMap,
    architecture: str,
    root_hash: str | None,
) -> SnapshotConfig:
    extents, block = [], metadata_blocks
    layers, tree = chunk_map.extents, None
    if root_hash is not None:
        *layers, last = chunk_map.extents
        tree = VerityConfig(root_hash, DeviceExtent(last.id, total, last.total_blocks))
    for extent in layers:
        extents.append(
            ExtentConfig(extent.diff_id, extent.diff_id, extent.id, block, extent.total_blocks)
        )
        block += extent.total_blocks
    return SnapshotConfig(
        os="linux",
        architecture=architecture,
        variant="",
        rules=Rules().text,
        source_manifest=sha256_digest(b"source manifest"),
        source_config=sha256_digest(b"source config"),
        metadata_digest=sha256_digest(region),
        metadata_blocks=metadata_blocks,
        total_blocks=total,
        inode_count=1,
        uuid="0" * 32,
        extents=tuple(extents),
        verity=tree,
    )


def random_device(blocks: int, seed: int = 7) -> bytes:
    """A device without a file system: compressible, random and zero blocks mixed in runs."""
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < blocks * BLOCK_SIZE:
        kind = rng.randrange(4)
        size = rng.choice((4, 16, 64, 256)) * KIB
        if kind == 0:
            out += bytes(size)
        elif kind == 1:
            out += rng.randbytes(size)
        else:
            out += (rng.randbytes(64) * (size // 64 + 1))[:size]
    return bytes(out[: blocks * BLOCK_SIZE])
