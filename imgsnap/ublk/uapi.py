"""Structures and numbers of the kernel's ublk and io_uring interfaces.

Source: include/uapi/linux/ublk_cmd.h and include/uapi/linux/io_uring.h. All little endian here: the
driver exists for 64-bit machines of that kind only as far as we support them. What is read and
written for every request is a `struct.Struct`, the rest a `ctypes.Structure`.
"""

import struct
from ctypes import Structure, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum, IntFlag

PAGE = 4096
SECTOR = 512

# io_uring ----------------------------------------------------------------------------------------

SYS_IO_URING_SETUP = 425
SYS_IO_URING_ENTER = 426
"""The same numbers on every architecture (include/uapi/asm-generic/unistd.h)."""

OP_POLL_ADD = 6
OP_URING_CMD = 46
ENTER_GETEVENTS = 1
OFF_SQ_RING = 0
OFF_SQES = 0x10000000
FEAT_SINGLE_MMAP = 1

SQE_SIZE = 128
"""With IORING_SETUP_SQE128."""
CQE_SIZE = 16


class Setup(IntFlag):
    """IORING_SETUP_*."""

    CQSIZE = 1 << 3
    CLAMP = 1 << 4
    SQE128 = 1 << 10
    SINGLE_ISSUER = 1 << 12
    DEFER_TASKRUN = 1 << 13


class SqOffsets(Structure):
    """struct io_sqring_offsets"""

    _fields_ = (
        ("head", c_uint32),
        ("tail", c_uint32),
        ("ring_mask", c_uint32),
        ("ring_entries", c_uint32),
        ("flags", c_uint32),
        ("dropped", c_uint32),
        ("array", c_uint32),
        ("reserved", c_uint32),
        ("user_addr", c_uint64),
    )


class CqOffsets(Structure):
    """struct io_cqring_offsets"""

    _fields_ = (
        ("head", c_uint32),
        ("tail", c_uint32),
        ("ring_mask", c_uint32),
        ("ring_entries", c_uint32),
        ("overflow", c_uint32),
        ("cqes", c_uint32),
        ("flags", c_uint32),
        ("reserved", c_uint32),
        ("user_addr", c_uint64),
    )


class RingParams(Structure):
    """struct io_uring_params"""

    _fields_ = (
        ("sq_entries", c_uint32),
        ("cq_entries", c_uint32),
        ("flags", c_uint32),
        ("sq_thread_cpu", c_uint32),
        ("sq_thread_idle", c_uint32),
        ("features", c_uint32),
        ("wq_fd", c_uint32),
        ("reserved", c_uint32 * 3),
        ("sq_off", SqOffsets),
        ("cq_off", CqOffsets),
    )


assert sizeof(SqOffsets) == sizeof(CqOffsets) == 40
assert sizeof(RingParams) == 120

SQE_POLL = struct.Struct("<BBHiQQIIQ 24x")
"""struct io_uring_sqe of POLL_ADD: 0 1 opcode · 1 1 flags · 2 2 ioprio · 4 4 fd · 8 8 off ·
16 8 addr · 24 4 len · 28 4 poll32_events · 32 8 user_data · 40 24 unused"""
SQE_COMMAND = struct.Struct("<BBHiIIQIIQ 8x")
"""struct io_uring_sqe of URING_CMD: 8 4 cmd_op · 12 4 zero · else as above, up to `cmd` at 48"""
CQE = struct.Struct("<Qi4x")
"""struct io_uring_cqe: 0 8 user_data · 8 4 res · 12 4 flags"""
assert SQE_POLL.size == 64
assert SQE_COMMAND.size == 48
assert CQE.size == CQE_SIZE

# ublk --------------------------------------------------------------------------------------------

CONTROL_DEVICE = "/dev/ublk-control"
NEW_DEVICE_ID = 0xFFFFFFFF
"""To ADD_DEV: any that is free."""
NO_QUEUE = 0xFFFF
QUEUE_DEPTH_MAX = 4096
MINORS = 1 << 20
ABORTED = -19
"""UBLK_IO_RES_ABORT, -ENODEV: the device is being stopped; the tag is not fetched again."""


class Feature(IntFlag):
    """UBLK_F_*."""

    USER_RECOVERY = 1 << 3
    USER_RECOVERY_REISSUE = 1 << 4
    CMD_IOCTL_ENCODE = 1 << 6
    SAFE_STOP_DEV = 1 << 17
    NO_AUTO_PART_SCAN = 1 << 18


class State(IntEnum):
    """UBLK_S_DEV_*."""

    DEAD = 0
    LIVE = 1
    QUIESCED = 2
    FAIL_IO = 3


class ControlCommand(Structure):
    """struct ublksrv_ctrl_cmd"""

    _fields_ = (
        ("dev_id", c_uint32),
        ("queue_id", c_uint16),
        ("len", c_uint16),
        ("addr", c_uint64),
        ("data", c_uint64),
        ("dev_path_len", c_uint16),
        ("pad", c_uint16),
        ("reserved", c_uint32),
    )


class DeviceInfo(Structure):
    """struct ublksrv_ctrl_dev_info"""

    _fields_ = (
        ("nr_hw_queues", c_uint16),
        ("queue_depth", c_uint16),
        ("state", c_uint16),
        ("pad0", c_uint16),
        ("max_io_buf_bytes", c_uint32),
        ("dev_id", c_uint32),
        ("ublksrv_pid", c_int32),
        ("pad1", c_uint32),
        ("flags", c_uint64),
        ("ublksrv_flags", c_uint64),  # ours: the kernel only keeps it
        ("owner_uid", c_uint32),
        ("owner_gid", c_uint32),
        ("reserved1", c_uint64),
        ("reserved2", c_uint64),
    )


class BasicParams(Structure):
    """struct ublk_param_basic"""

    _fields_ = (
        ("attrs", c_uint32),
        ("logical_bs_shift", c_uint8),
        ("physical_bs_shift", c_uint8),
        ("io_opt_shift", c_uint8),
        ("io_min_shift", c_uint8),
        ("max_sectors", c_uint32),
        ("chunk_sectors", c_uint32),
        ("dev_sectors", c_uint64),
        ("virt_boundary_mask", c_uint64),
    )


ATTR_READ_ONLY = 1
PARAM_TYPE_BASIC = 1


class Params(Structure):
    """struct ublk_params as far as its basic part: the kernel takes any length it is told."""

    _fields_ = (("len", c_uint32), ("types", c_uint32), ("basic", BasicParams))


assert sizeof(ControlCommand) == 32
assert sizeof(DeviceInfo) == 64
assert sizeof(BasicParams) == 32
assert sizeof(Params) == 40

IO_DESCRIPTION = struct.Struct("<IIQQ")
"""struct ublksrv_io_desc: 0 4 op_flags (operation in bits 0-7) · 4 4 nr_sectors ·
8 8 start_sector · 16 8 addr"""
IO_COMMAND = struct.Struct("<HHiQ")
"""struct ublksrv_io_cmd: 0 2 q_id · 2 2 tag · 4 4 result · 8 8 addr"""
assert IO_DESCRIPTION.size == 24
assert IO_COMMAND.size == 16

OP_READ = 0
OP_FLUSH = 2
OP_MASK = 0xFF

_WRITE, _READ = 1, 2  # as ioctl(2) numbers have them, from the kernel's side


def _number(direction: int, number: int, size: int) -> int:
    """_IOC('u', …) of include/uapi/asm-generic/ioctl.h."""
    return direction << 30 | size << 16 | ord("u") << 8 | number


class Control(IntEnum):
    """UBLK_U_CMD_*."""

    GET_DEV_INFO = _number(_READ, 0x02, 32)
    ADD_DEV = _number(_WRITE | _READ, 0x04, 32)
    DEL_DEV = _number(_WRITE | _READ, 0x05, 32)
    START_DEV = _number(_WRITE | _READ, 0x06, 32)
    STOP_DEV = _number(_WRITE | _READ, 0x07, 32)
    SET_PARAMS = _number(_WRITE | _READ, 0x08, 32)
    START_USER_RECOVERY = _number(_WRITE | _READ, 0x10, 32)
    END_USER_RECOVERY = _number(_WRITE | _READ, 0x11, 32)
    GET_FEATURES = _number(_READ, 0x13, 32)
    DEL_DEV_ASYNC = _number(_READ, 0x14, 32)
    TRY_STOP_DEV = _number(_WRITE | _READ, 0x17, 32)


IO_FETCH = _number(_WRITE | _READ, 0x20, 16)
IO_COMMIT_AND_FETCH = _number(_WRITE | _READ, 0x21, 16)


def descriptions_size(depth: int) -> int:
    """Bytes of one queue's descriptions, as they are mapped."""
    return -(-depth * IO_DESCRIPTION.size // PAGE) * PAGE


def descriptions_offset(queue: int) -> int:
    """Where a queue's descriptions are in /dev/ublkcN."""
    return queue * descriptions_size(QUEUE_DEPTH_MAX)
