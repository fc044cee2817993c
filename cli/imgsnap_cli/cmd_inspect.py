"""imgsnap inspect"""

import sys
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from imgsnap.errors import Unavailable
from imgsnap.formats.chunk_map import ZERO_PACK
from imgsnap.units import BLOCK_SIZE, format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import Places, platform_option, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.snapshot import Snapshot
    from imgsnap.formats.snapshot_config import SnapshotConfig

Frame = tuple[int, int]
"""(pack number, offset): one stored frame."""


@click.command(short_help="Show what a snapshot is made of")
@click.argument("ref")
@click.option("--raw", is_flag=True, help="The manifest's exact bytes")
@platform_option
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings, /, ref: str, raw: bool, platform: str | None, format_: str, **flags: Any
) -> None:
    """Show the layers, sizes and chunks of the snapshot REF, fetching only its metadata.

    STORED counts each compressed frame once for the layer; SHARED is the part of it that other
    layers of the snapshot use too.
    """
    places = Places(settings, flags)
    with ExitStack() as stack:
        if raw:
            repository, reference = places.reader(stack, ref)
            sys.stdout.buffer.write(repository.manifest(reference).raw)
            return
        snapshot = places.any_snapshot(stack, ref, platform)
        value = {**describe(snapshot), "bootPacks": _boot_packs(snapshot)}
    if format_ == "json":
        print_json(value)
    else:
        _print(value)


def describe(snapshot: "Snapshot") -> dict[str, Any]:
    """The snapshot as a JSON document; sizes in bytes."""
    config, chunk_map = snapshot.config, snapshot.chunk_map
    users: Counter[Frame] = Counter()
    lengths: dict[Frame, int] = {}
    per_extent: list[set[Frame]] = []
    for extent in chunk_map.extents:
        rows = zip(extent.pack, extent.offset, extent.length, strict=True)
        frames = {(pack, offset): length for pack, offset, length in rows if pack != ZERO_PACK}
        lengths.update(frames)
        users.update(frames.keys())
        per_extent.append(set(frames))
    layers = []
    # After the layers' extents comes that of the hash tree, if there is one.
    for extent, stated, used in zip(chunk_map.extents, config.extents, per_extent, strict=False):
        stored = sum(lengths[frame] for frame in used)
        shared = sum(lengths[frame] for frame in used if users[frame] > 1)
        layers.append(
            {
                "diffID": stated.diff_id,
                "chainID": stated.chain_id,
                "extentID": stated.extent_id,
                "baseBlock": stated.base_block,
                "size": stated.blocks * BLOCK_SIZE,
                "chunks": len(extent),
                "zeroChunks": sum(1 for pack in extent.pack if pack == ZERO_PACK),
                "stored": stored,
                "unique": stored - shared,
                "shared": shared,
            }
        )
    manifest = snapshot.manifest
    return {
        "digest": manifest.digest,
        "platform": "/".join(
            part for part in (config.os, config.architecture, config.variant) if part
        ),
        "source": {"manifest": config.source_manifest, "config": config.source_config},
        "rules": config.rules,
        "deviceSize": snapshot.size,
        "inodes": config.inode_count,
        "uuid": config.uuid,
        "metadata": {"size": snapshot.metadata_size, "stored": manifest.metadata.size},
        "chunkMap": {"stored": manifest.chunk_map.size},
        "packs": [{"digest": pack.digest, "size": pack.size} for pack in chunk_map.packs],
        "stored": sum(lengths.values()),
        "verity": _verity(config, [lengths[frame] for used in per_extent[-1:] for frame in used]),
        "layers": layers,
    }


def _verity(config: "SnapshotConfig", stored: list[int]) -> dict[str, Any] | None:
    """The hash tree as `veritysetup` asks for it; sizes in bytes."""
    if config.verity is None:
        return None
    return {
        "rootHash": config.verity.root_hash,
        "dataBlocks": config.total_blocks,
        "hashOffset": config.total_blocks * BLOCK_SIZE,
        "size": config.verity.extent.blocks * BLOCK_SIZE,
        "stored": sum(stored),
    }


def _boot_packs(snapshot: "Snapshot") -> list[dict[str, Any]] | None:
    """None when the repository does not say: everything else may come from the cache."""
    from imgsnap.blockstore.boot_choice import boot_packs

    try:
        packs = boot_packs(snapshot.repository, snapshot.manifest.digest)
    except Unavailable:
        return None
    return [
        {
            "name": pack.name,
            "default": pack.default,
            "created": pack.created,
            "digest": pack.blob.digest,
            "size": pack.blob.size,
        }
        for pack in packs
    ]


def _verity_pairs(verity: dict[str, Any] | None) -> list[tuple[str, str]]:
    if verity is None:
        return []
    size, stored = format_size(verity["size"]), format_size(verity["stored"])
    return [("root hash", verity["rootHash"]), ("hash tree", f"{size}, stored {stored}")]


def _print(value: dict[str, Any]) -> None:
    metadata = value["metadata"]
    pairs = (
        ("digest", value["digest"]),
        ("platform", value["platform"]),
        ("source image", value["source"]["manifest"]),
        ("device", f"{format_size(value['deviceSize'])}, {value['inodes']} inodes"),
        ("metadata", f"{format_size(metadata['size'])}, stored {format_size(metadata['stored'])}"),
        ("chunk map", f"stored {format_size(value['chunkMap']['stored'])}"),
        ("data", f"stored {format_size(value['stored'])} in {len(value['packs'])} packs"),
        ("rules", value["rules"]),
        *_verity_pairs(value["verity"]),
    )
    for name, text in pairs:
        click.echo(f"{name + ':':<14}{text}")
    click.echo()
    print_table(
        ("LAYER", "SIZE", "CHUNKS", "ZERO", "STORED", "UNIQUE", "SHARED"),
        [
            (
                layer["diffID"][7:19],
                format_size(layer["size"]),
                layer["chunks"],
                layer["zeroChunks"],
                format_size(layer["stored"]),
                format_size(layer["unique"]),
                format_size(layer["shared"]),
            )
            for layer in value["layers"]
        ],
    )
    if value["bootPacks"]:
        click.echo()
        print_table(
            ("BOOT PACK", "SIZE", "CREATED", "DIGEST"),
            [
                (
                    pack["name"] + (" (default)" if pack["default"] else ""),
                    format_size(pack["size"]),
                    pack["created"],
                    pack["digest"][7:19],
                )
                for pack in value["bootPacks"]
            ],
        )
