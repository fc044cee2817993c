"""A guest's verified root: what its init does in the place of `veritysetup open`.

A program of its own, for one table: nothing in the guest takes the root hash from the disk or from
elsewhere. ioctls and records: include/uapi/linux/dm-ioctl.h, version 4.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

from imgsnap.errors import IntegrityError, InvalidArgument
from imgsnap.formats.snapshot_config import SnapshotConfig
from imgsnap.formats.verity import VerityLayout, is_root_hash
from imgsnap.vm.assembler import Assembler, program

DISK = "/dev/vda"
PROGRAM = "verity"
"""Its name in the initramfs; init runs it if it is there."""
_CONTROL = "/dev/mapper/control"
_NAME = b"root"
_OPEN, _CLOSE, _IOCTL = 2, 3, 16
_O_RDWR = 2
_READ_ONLY = 1
"""DM_READONLY_FLAG, without which dm-verity refuses its table."""
_CREATE, _LOAD, _RESUME = 3, 9, 6
"""DM_DEV_CREATE_CMD, DM_TABLE_LOAD_CMD, DM_DEV_SUSPEND_CMD: without its flag that one resumes."""


class DmIoctl(NamedTuple):
    """struct dm_ioctl.

    ======  ====  =====  ============  ===================================================
    offset  size  type   name          meaning
    ======  ====  =====  ============  ===================================================
    0       4     u32    major         4
    4       4     u32    minor         0: what is asked for here is in all of them
    8       4     u32    patch         0
    12      4     u32    data_size     of the record and what follows it
    16      4     u32    data_start    from the record's start to what follows it
    20      4     u32    target_count
    24      4     i32    open_count    0
    28      4     u32    flags
    32      4     u32    event_nr      0
    36      4            (reserved)
    40      8     u64    dev           0
    48      128   bytes  name          of the mapped device
    176     129   bytes  uuid          none
    305     7            (reserved)
    ======  ====  =====  ============  ===================================================
    """

    major: int
    minor: int
    patch: int
    data_size: int
    data_start: int
    target_count: int
    open_count: int
    flags: int
    event_nr: int
    dev: int
    name: bytes
    uuid: bytes


DM_IOCTL = struct.Struct("<IIIIIIiII4xQ128s129s7x")
assert DM_IOCTL.size == 312


class DmTargetSpec(NamedTuple):
    """struct dm_target_spec; its parameters follow, ended by a NUL.

    ======  ====  =====  ============  ===================================================
    offset  size  type   name          meaning
    ======  ====  =====  ============  ===================================================
    0       8     u64    sector_start  0
    8       8     u64    length        in sectors of 512 bytes
    16      4     i32    status        0
    20      4     u32    next          from here to the next one, or to the end
    24      16    bytes  target_type   ``verity``
    ======  ====  =====  ============  ===================================================
    """

    sector_start: int
    length: int
    status: int
    next: int
    target_type: bytes


DM_TARGET_SPEC = struct.Struct("<QQiI16s")
assert DM_TARGET_SPEC.size == 40


@dataclass(frozen=True, slots=True)
class VerifiedRoot:
    """A disk with a hash tree, and the root hash that it is verified by."""

    layout: VerityLayout
    root_hash: str


def check_root_hash(text: str) -> str:
    """A root hash as a user gave it, in lower case. Raises InvalidArgument."""
    if not is_root_hash(text.lower()):
        raise InvalidArgument(
            f"{text[:80]!r} is not a root hash", hint="64 hex digits; imgsnap inspect shows it"
        )
    return text.lower()


def verified_root(config: SnapshotConfig, demanded: str | None) -> VerifiedRoot | None:
    """How a guest verifies this snapshot; None for one without a hash tree.

    Raises IntegrityError when it is not the root hash that was demanded.
    """
    if demanded is not None and demanded != config.root_hash:
        raise IntegrityError(
            f"the snapshot's root hash is {config.root_hash}, not {demanded}"
            if config.root_hash is not None
            else f"the snapshot has no hash tree; the root hash {demanded} is demanded",
            hint="imgsnap inspect shows a snapshot's root hash, imgsnap convert --verity makes one",
        )
    if config.root_hash is None:
        return None
    return VerifiedRoot(VerityLayout(config.total_blocks), config.root_hash)


def verity_program(root: VerifiedRoot) -> bytes:
    """A program that maps DISK as /dev/dm-0, the first mapped device; it exits with 0 when it has.

    It needs a devtmpfs on /dev, which has the control device's node.
    """
    return program(lambda out: _write(out, root))


def _write(out: Assembler, root: VerifiedRoot) -> None:
    out.call(_CLOSE, 0)  # the next descriptor is 0
    out.must(f"cannot open {_CONTROL}", _OPEN, out.text_at(_CONTROL), _O_RDWR)
    for what, command, record in (
        ("cannot create a mapped device", _CREATE, _record()),
        ("the kernel does not take the dm-verity table", _LOAD, table_record(root)),
        ("cannot start the mapped device", _RESUME, _record()),
    ):
        out.must(what, _IOCTL, 0, _request(command), out.bytes_at(record))
    out.exit(0)


def _request(command: int) -> int:
    """_IOWR(DM_IOCTL, command, struct dm_ioctl), asm-generic/ioctl.h."""
    return 3 << 30 | DM_IOCTL.size << 16 | 0xFD << 8 | command


def _record(more: bytes = b"", targets: int = 0, flags: int = 0) -> bytes:
    size = DM_IOCTL.size + len(more)
    fields = DmIoctl(4, 0, 0, size, DM_IOCTL.size, targets, 0, flags, 0, 0, _NAME, b"")
    return DM_IOCTL.pack(*fields) + more


def table_record(root: VerifiedRoot) -> bytes:
    """What DM_TABLE_LOAD gets: a read-only table of one line."""
    start, length, kind, line = root.layout.table(DISK, root.root_hash).split(" ", 3)
    parameters = line.encode() + b"\0"
    parameters += bytes(-len(parameters) % 8)
    size = DM_TARGET_SPEC.size + len(parameters)
    target = DM_TARGET_SPEC.pack(*DmTargetSpec(int(start), int(length), 0, size, kind.encode()))
    return _record(target + parameters, targets=1, flags=_READ_ONLY)
