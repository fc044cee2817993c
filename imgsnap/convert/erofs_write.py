"""EROFS metadata for a merged tree; file bytes stay in the layers' extents.

The device is `[metadata][extent of layer 0][extent of layer 1]...`. The metadata is block 0 with
the superblock, then inodes (each with its xattrs and inline data), then whole blocks of large
directories and of symlinks that do not fit inline.

Everything is columns over all inodes or all directory entries, handled by C loops (`map`,
`array` slices); only placement is a Python loop. That keeps 50 000 inodes under half a second.
"""

from __future__ import annotations

import gc
import hashlib
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from operator import or_

from imgsnap.convert.erofs_plan import (
    DIRENT_SIZE,
    INODE_SIZE,
    Numbering,
    Placement,
    Rows,
    join_rows,
    number_inodes,
    place_inodes,
)
from imgsnap.convert.flatten import Tree
from imgsnap.digest import digest_to_raw
from imgsnap.errors import Unsupported
from imgsnap.formats import erofs
from imgsnap.formats.layer_index import Kind
from imgsnap.units import BLOCK_SIZE, blocks_for

DEVICE_BLOCKS_MAX = 0xFFFFFFFF
"""Blocks: EROFS without 48-bit addresses, 16 TiB."""

_WORDS = INODE_SIZE // 4  # an inode as 32-bit words, see _inode_table
_UUID_DOMAIN = b"imgsnap erofs metadata 1\0"

assert array("I").itemsize == 4


@dataclass(frozen=True, slots=True)
class ErofsMetadata:
    """The metadata region of a device and where the layers' extents go behind it."""

    metadata: bytes  # a multiple of BLOCK_SIZE
    bases: tuple[int, ...]  # block address of each layer's extent
    total_blocks: int
    inode_count: int
    uuid: bytes  # 16 bytes


@contextmanager
def _without_gc() -> Iterator[None]:
    """Hundreds of thousands of new tuples and no cycles: collections would only cost time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def emit(tree: Tree) -> ErofsMetadata:
    """The EROFS metadata of `tree`; equal trees of equal layers give equal bytes.

    Raises Unsupported, with the path, for what EROFS cannot hold.
    """
    with _without_gc():
        rows = join_rows(tree)
        numbering = number_inodes(tree.root, rows)
        placement = place_inodes(rows, numbering)
        return _assemble(tree, rows, numbering, placement)


def _assemble(tree: Tree, rows: Rows, numbering: Numbering, place: Placement) -> ErofsMetadata:
    # fsck.erofs 1.5 reads an xattr header behind every inode, even behind the last one of a device.
    data_start = blocks_for(place.inode_bytes + erofs.XATTR_HEADER.size)
    metadata_blocks = data_start + place.data_blocks
    ends = list(accumulate((layer.extent_blocks for layer in tree.layers), initial=metadata_blocks))
    total_blocks = ends.pop()
    if total_blocks > DEVICE_BLOCKS_MAX:
        raise Unsupported(
            f"the image needs {total_blocks} blocks; EROFS addresses {DEVICE_BLOCKS_MAX}"
        )
    out = bytearray(metadata_blocks * BLOCK_SIZE)
    _write_inodes(out, rows, numbering, place, data_start, metadata_blocks)
    _write_symlinks(out, rows, numbering, place, data_start)
    _write_directories(out, rows, numbering, place, data_start)
    uuid = _write_superblock(out, tree, len(numbering.rows), place.nids[0], total_blocks)
    return ErofsMetadata(bytes(out), tuple(ends), total_blocks, len(numbering.rows), uuid)


def _write_inodes(
    out: bytearray,
    rows: Rows,
    numbering: Numbering,
    place: Placement,
    data_start: int,
    metadata_blocks: int,
) -> None:
    table = _inode_table(rows, numbering, place, data_start, metadata_blocks)
    with memoryview(table).cast("B") as source:
        at = 0
        for nid in place.nids:
            start = nid << erofs.SLOT_BITS
            out[start : start + INODE_SIZE] = source[at : at + INODE_SIZE]
            at += INODE_SIZE
    for number, body in place.xattrs.items():
        start = (place.nids[number] << erofs.SLOT_BITS) + INODE_SIZE
        out[start : start + len(body)] = body


def _inode_table(
    rows: Rows, numbering: Numbering, place: Placement, data_start: int, metadata_blocks: int
) -> array[int]:
    """All inodes as ExtendedInode records, one after the other.

    A record is 16 words; word w of all inodes is the slice [w::16].
    """
    chosen = numbering.rows
    modes = [erofs.KIND_MODE[k] | m for k, m in zip(rows.kind, rows.mode, strict=True)]
    shift = metadata_blocks - 1  # rows.block is one too large
    blocks, rdevs = map(rows.block.__getitem__, chosen), map(rows.rdev.__getitem__, chosen)
    data = [b + shift if b else rdev for b, rdev in zip(blocks, rdevs, strict=True)]
    for number, first in place.data.items():
        data[number] = data_start + first
    size_low, size_high = _halves(place.sizes)
    mtime_low, mtime_high = _halves(array("q", map(rows.mtime.__getitem__, chosen)))
    columns = (
        place.formats,
        array("I", map(modes.__getitem__, chosen)),
        size_low,
        size_high,
        array("I", data),
        array("I", range(1, len(chosen) + 1)),
        array("I", map(rows.uid.__getitem__, chosen)),
        array("I", map(rows.gid.__getitem__, chosen)),
        mtime_low,
        mtime_high,
        array("I", map(rows.nsec.__getitem__, chosen)),
        array("I", numbering.nlink),
    )
    table = array("I", bytes(len(chosen) * INODE_SIZE))
    for word, column in enumerate(columns):
        table[word::_WORDS] = column
    return _little_endian(table)


def _halves(column: array[int]) -> tuple[array[int], array[int]]:
    """The low and the high 32 bits of a column of 64-bit numbers."""
    words = array("I", column.tobytes())
    first, second = words[0::2], words[1::2]
    return (first, second) if sys.byteorder == "little" else (second, first)


def _little_endian(words: array[int]) -> array[int]:
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _write_symlinks(
    out: bytearray, rows: Rows, numbering: Numbering, place: Placement, data_start: int
) -> None:
    kinds = rows.kind
    for number in chain(place.inline, place.data):
        row = numbering.rows[number]
        if kinds[row] != Kind.SYMLINK:
            continue
        target = rows.targets[rows.target[row]]
        start = place.inline.get(number)
        if start is None:
            start = (data_start + place.data[number]) * BLOCK_SIZE
        out[start : start + len(target)] = target


def _write_directories(
    out: bytearray, rows: Rows, numbering: Numbering, place: Placement, data_start: int
) -> None:
    # The third word of a dirent: name offset in the low half, file type in the byte after it.
    shifted = [file_type << 16 for file_type in erofs.KIND_FILE_TYPE]
    kinds = map(rows.kind.__getitem__, numbering.rows)
    types = list(map(shifted.__getitem__, kinds))
    nids = place.nids
    for number, plan in numbering.directories.items():
        inline = place.inline.get(number)
        at = (data_start + place.data.get(number, 0)) * BLOCK_SIZE
        begin = 0
        for end in plan.cuts:
            block = _directory_block(plan.names[begin:end], plan.inodes[begin:end], nids, types)
            if inline is not None and end == len(plan.names):
                at = inline
            out[at : at + len(block)] = block
            at += BLOCK_SIZE
            begin = end


def _directory_block(
    names: list[bytes], inodes: list[int], nids: array[int], types: list[int]
) -> bytes:
    """The Dirent records of `names` and then the names."""
    offsets = accumulate(map(len, names), initial=DIRENT_SIZE * len(names))
    words = array("I", bytes(DIRENT_SIZE * len(names)))
    words[0::3] = array("I", map(nids.__getitem__, inodes))
    words[2::3] = array("I", map(or_, map(types.__getitem__, inodes), offsets))
    return _little_endian(words).tobytes() + b"".join(names)


def _write_superblock(
    out: bytearray, tree: Tree, inode_count: int, root_nid: int, total_blocks: int
) -> bytes:
    """Fills in the superblock, and returns the uuid that it made up from all the bytes."""
    assert root_nid <= erofs.ROOT_NID_MAX, "the root is numbered, and so placed, first"
    record = erofs.Superblock(
        compat=erofs.COMPAT_SB_CHKSUM | erofs.COMPAT_MTIME,
        root_nid=root_nid,
        inodes=inode_count,
        blocks=total_blocks,
    )
    erofs.SUPERBLOCK.pack_into(out, erofs.SUPER_OFFSET, *record)
    uuid = _uuid(out, tree)
    record = record._replace(uuid=uuid)
    erofs.SUPERBLOCK.pack_into(out, erofs.SUPER_OFFSET, *record)
    record = record._replace(checksum=erofs.superblock_checksum(out))
    erofs.SUPERBLOCK.pack_into(out, erofs.SUPER_OFFSET, *record)
    return uuid


def _uuid(out: bytearray, tree: Tree) -> bytes:
    """A version 8 UUID (RFC 9562) from the metadata and, for the file bytes, the diffIDs."""
    hasher = hashlib.sha256(_UUID_DOMAIN)
    for layer in tree.layers:
        hasher.update(digest_to_raw(layer.diff_id))
    hasher.update(out)
    value = bytearray(hasher.digest()[:16])
    value[6] = value[6] & 0x0F | 0x80
    value[8] = value[8] & 0x3F | 0x80
    return bytes(value)
