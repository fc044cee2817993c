"""The superblock of a node's own making: the same tree, its data in several files.

Our metadata addresses one linear device, ``[metadata][extent 0][extent 1]…``. With a device table
(Linux, fs/erofs/erofs_fs.h: struct erofs_deviceslot; super.c, erofs_map_dev) the kernel takes an
address between `uniaddr` and `uniaddr` + `blocks` of a slot from that slot's device, so that no
inode has to be changed. The table costs the incompatible feature bit EROFS_FEATURE_INCOMPAT_
DEVICE_TABLE (Linux 5.16), so it is never published: it is made from the published bytes when a
snapshot is mounted, and only the superblock differs.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

from imgsnap.errors import LimitExceeded
from imgsnap.formats import erofs
from imgsnap.units import BLOCK_SIZE

INCOMPAT_DEVICE_TABLE = 0x8
DEVICES_MAX = 1024
"""As extents of a chunk map; the count in the superblock is a u16."""


class DeviceSlot(NamedTuple):
    """struct erofs_deviceslot, 128 bytes.

    ======  ====  =====  ===========  ==================================================
    offset  size  type   name         meaning
    ======  ====  =====  ===========  ==================================================
    0       64    bytes  tag          which device it is, for people; not empty
    64      4     u32    blocks       its length
    68      4     u32    uniaddr      first block of it in the linear device
    72      56            (reserved)   0: high halves of both, for 48-bit addresses
    ======  ====  =====  ===========  ==================================================
    """

    tag: bytes
    blocks: int
    uniaddr: int


DEVICE_SLOT = struct.Struct("<64sII56x")
assert DEVICE_SLOT.size == 128

TABLE_OFFSET_MAX = 0xFFFF * DEVICE_SLOT.size
"""Bytes: the superblock counts the table's place in slots, as a u16."""


def with_devices(region: bytes, devices: Sequence[DeviceSlot]) -> bytes:
    """The metadata region with a table of these devices after its end, and a new superblock.

    `region` is a whole number of blocks with a superblock of ours, which is checked. Raises
    LimitExceeded for a region that is too long to have a table behind it (8 MiB) or too many
    devices, FormatError for a damaged superblock.
    """
    if len(devices) > DEVICES_MAX:
        raise LimitExceeded("erofs.devices_max", len(devices), DEVICES_MAX, where="device table")
    if len(region) > TABLE_OFFSET_MAX:
        raise LimitExceeded(
            "erofs.device_table_offset", len(region), TABLE_OFFSET_MAX, where="device table"
        )
    block = bytearray(region[:BLOCK_SIZE])
    changed = erofs.parse_superblock(bytes(block))._replace(
        incompat=INCOMPAT_DEVICE_TABLE,
        extra_devices=len(devices),
        device_slot=len(region) // DEVICE_SLOT.size,
        blocks=len(region) // BLOCK_SIZE,  # of this file; the kernel adds the devices' own
    )
    erofs.SUPERBLOCK.pack_into(block, erofs.SUPER_OFFSET, *changed)
    changed = changed._replace(checksum=erofs.superblock_checksum(block))
    erofs.SUPERBLOCK.pack_into(block, erofs.SUPER_OFFSET, *changed)
    table = b"".join(DEVICE_SLOT.pack(*slot) for slot in devices)
    return bytes(block) + region[BLOCK_SIZE:] + table
