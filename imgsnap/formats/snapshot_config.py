"""The snapshot config: what a snapshot is, apart from where its bytes are stored.

Its digest is the snapshot's identity: a pure function of the source image and the rules. It
commits to the metadata (digest of the uncompressed bytes) and to every extent (`Extent.id`).
"""

import json
from dataclasses import dataclass
from typing import Any

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import FormatError, InvalidArgument, UnsupportedFormat
from imgsnap.formats.features import check_version
from imgsnap.formats.verity import ALGORITHM, HASH_BYTES, VerityLayout
from imgsnap.units import BLOCK_SIZE

RECORD = "snapshot config"
VERSION = 1
CONFIG_SIZE_MAX = 1 << 20
EXTENTS_MAX = 1024
BLOCKS_MAX = (1 << 32) - 1
"""EROFS block addresses are 32 bits here: 16 TiB."""
METADATA_BLOCKS_MAX = 1 << 18
"""1 GiB of metadata, about ten million inodes."""
VERITY = "verity"
"""The incompatible feature of a snapshot with a hash tree: it has one more extent than layers."""


@dataclass(frozen=True, slots=True)
class DeviceExtent:
    """A run of chunks on the device, in blocks."""

    extent_id: str  # hex BLAKE3-256, `Extent.id`
    base_block: int
    blocks: int


@dataclass(frozen=True, slots=True)
class ExtentConfig:
    """One layer's extent on the device, in blocks."""

    diff_id: Digest
    chain_id: Digest
    extent_id: str  # hex BLAKE3-256, `Extent.id`
    base_block: int
    blocks: int


@dataclass(frozen=True, slots=True)
class VerityConfig:
    """A snapshot's hash tree (formats/verity.py): over all blocks before it."""

    root_hash: str  # hex, 64 digits
    extent: DeviceExtent


@dataclass(frozen=True, slots=True)
class SnapshotConfig:
    """Identity and geometry of a snapshot.

    The device is `[metadata][extent 0][extent 1]...`, `total_blocks` blocks of 4096 bytes, and the
    verity area if there is one.
    """

    os: str
    architecture: str
    variant: str
    rules: str  # Rules.text
    source_manifest: Digest
    source_config: Digest
    metadata_digest: Digest  # of the uncompressed metadata region
    metadata_blocks: int
    total_blocks: int
    inode_count: int
    uuid: str  # hex, 32 digits
    extents: tuple[ExtentConfig, ...]  # of the layers
    verity: VerityConfig | None = None

    @property
    def device_extents(self) -> tuple[ExtentConfig | DeviceExtent, ...]:
        """All extents of the device, as the chunk map has them: the layers' and the tree's."""
        return (*self.extents, self.verity.extent) if self.verity else self.extents

    @property
    def root_hash(self) -> str | None:
        """Of the hash tree, in hex; None without one."""
        return self.verity.root_hash if self.verity else None

    @property
    def device_blocks(self) -> int:
        """Of the whole device, the verity area included."""
        return self.total_blocks + (self.verity.extent.blocks if self.verity else 0)

    def to_json(self) -> bytes:
        """Canonical bytes: sorted keys, no spaces."""
        incompat = [VERITY] if self.verity else []
        value: dict[str, Any] = {
            "format": {"version": VERSION, "compat": [], "roCompat": [], "incompat": incompat},
            "platform": {
                "os": self.os,
                "architecture": self.architecture,
                "variant": self.variant,
            },
            "rules": self.rules,
            "source": {"manifest": self.source_manifest, "config": self.source_config},
            "erofs": {
                "uuid": self.uuid,
                "metadataDigest": self.metadata_digest,
                "metadataBlocks": self.metadata_blocks,
                "totalBlocks": self.total_blocks,
                "inodes": self.inode_count,
            },
            "extents": [
                {
                    "diffID": extent.diff_id,
                    "chainID": extent.chain_id,
                    "extentID": extent.extent_id,
                    "baseBlock": extent.base_block,
                    "blocks": extent.blocks,
                }
                for extent in self.extents
            ],
        }
        if self.verity:
            value["verity"] = {
                "algorithm": ALGORITHM,
                "rootHash": self.verity.root_hash,
                "dataBlocks": self.total_blocks,
                "hashOffset": self.total_blocks * BLOCK_SIZE,
                "extentID": self.verity.extent.extent_id,
                "blocks": self.verity.extent.blocks,
            }
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def parse_config(raw: bytes) -> SnapshotConfig:
    """The value of a config blob. Raises FormatError or UnsupportedFormat."""
    if len(raw) > CONFIG_SIZE_MAX:
        raise FormatError(RECORD, "length", 0, f"{len(raw)} bytes is over {CONFIG_SIZE_MAX}")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(RECORD, "JSON", 0, str(error)) from error
    fields = _Fields(value, "")
    sealed = _check_format(fields.child("format"))
    platform, source, erofs = (fields.child(name) for name in ("platform", "source", "erofs"))
    total_blocks = erofs.integer("totalBlocks", BLOCKS_MAX)
    config = SnapshotConfig(
        os=platform.text("os"),
        architecture=platform.text("architecture"),
        variant=platform.text("variant"),
        rules=fields.text("rules"),
        source_manifest=source.digest("manifest"),
        source_config=source.digest("config"),
        metadata_digest=erofs.digest("metadataDigest"),
        metadata_blocks=erofs.integer("metadataBlocks", METADATA_BLOCKS_MAX),
        total_blocks=total_blocks,
        inode_count=erofs.integer("inodes", BLOCKS_MAX),
        uuid=erofs.hexadecimal("uuid", 32),
        extents=tuple(_extent(child) for child in fields.children("extents", EXTENTS_MAX)),
        verity=_verity(fields.child("verity"), total_blocks) if sealed else None,
    )
    _check_geometry(config)
    if not sealed and "verity" in value:
        raise FormatError(RECORD, "verity", 0, "is there without its feature")
    return config


def _check_format(fields: "_Fields") -> bool:
    """Whether the snapshot has a hash tree."""
    check_version(RECORD, fields.integer("version", 1 << 16), VERSION)
    incompat = fields.value.get("incompat", [])
    if incompat not in ([], [VERITY]):
        raise UnsupportedFormat(
            f"{RECORD}: unknown incompatible features {str(incompat)[:200]}",
            hint="it was written by a newer imgsnap; upgrade this one",
        )
    return bool(incompat)


def _extent(fields: "_Fields") -> ExtentConfig:
    return ExtentConfig(
        diff_id=fields.digest("diffID"),
        chain_id=fields.digest("chainID"),
        extent_id=fields.hexadecimal("extentID", 64),
        base_block=fields.integer("baseBlock", BLOCKS_MAX),
        blocks=fields.integer("blocks", BLOCKS_MAX),
    )


def _verity(fields: "_Fields", total_blocks: int) -> VerityConfig:
    """The tree covers the whole device before it and has the size that this asks for."""
    algorithm = fields.text("algorithm")
    if algorithm != ALGORITHM:
        raise FormatError(RECORD, "verity.algorithm", 0, f"{algorithm!r} is not {ALGORITHM!r}")
    blocks = VerityLayout(total_blocks).blocks
    for name, value in (
        ("dataBlocks", total_blocks),
        ("hashOffset", total_blocks * BLOCK_SIZE),
        ("blocks", blocks),
    ):
        stated = fields.integer(name, BLOCKS_MAX * BLOCK_SIZE)
        if stated != value:
            raise FormatError(RECORD, f"verity.{name}", 0, f"{stated}, not {value}")
    if total_blocks + blocks > BLOCKS_MAX:
        raise FormatError(RECORD, "verity.blocks", 0, f"the device has over {BLOCKS_MAX} blocks")
    extent_id = fields.hexadecimal("extentID", 64)
    root_hash = fields.hexadecimal("rootHash", HASH_BYTES * 2)
    return VerityConfig(root_hash, DeviceExtent(extent_id, total_blocks, blocks))


def _check_geometry(config: SnapshotConfig) -> None:
    """The device is the metadata followed by the extents, without gaps."""
    block = config.metadata_blocks
    if not block:
        raise FormatError(RECORD, "erofs.metadataBlocks", 0, "is zero")
    for number, extent in enumerate(config.extents):
        if extent.base_block != block:
            raise FormatError(
                RECORD, f"extents[{number}].baseBlock", 0, f"{extent.base_block}, not {block}"
            )
        block += extent.blocks
    if block != config.total_blocks:
        raise FormatError(RECORD, "erofs.totalBlocks", 0, f"{config.total_blocks}, not {block}")


class _Fields:
    """Typed access to a JSON object; every refusal names the field's path."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(RECORD, path or "value", 0, "is not an object")
        self.value: dict[str, Any] = value
        self.path = path

    def _name(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _fail(self, key: str, problem: str) -> FormatError:
        return FormatError(RECORD, self._name(key), 0, problem)

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or len(value) > 1024:
            raise self._fail(key, "is not a string of at most 1024 characters")
        return value

    def hexadecimal(self, key: str, digits: int) -> str:
        value = self.text(key)
        if len(value) != digits or set(value) - set("0123456789abcdef"):
            raise self._fail(key, f"is not {digits} hex digits")
        return value

    def digest(self, key: str) -> Digest:
        try:
            return parse_digest(self.text(key))
        except InvalidArgument as error:
            raise self._fail(key, str(error)) from error

    def integer(self, key: str, maximum: int) -> int:
        value = self.value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
            raise self._fail(key, f"{str(value)[:40]!r} is not an integer from 0 to {maximum}")
        return value

    def child(self, key: str) -> "_Fields":
        return _Fields(self.value.get(key), self._name(key))

    def children(self, key: str, maximum: int) -> "list[_Fields]":
        value = self.value.get(key)
        if not isinstance(value, list) or len(value) > maximum:
            raise self._fail(key, f"is not a list of at most {maximum} items")
        return [_Fields(item, f"{self._name(key)}[{n}]") for n, item in enumerate(value)]
