"""Layouts and numbers, against the kernel's headers where the compiler and they are there."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from imgsnap.ublk import uapi

HEADERS = Path("/usr/include/linux/ublk_cmd.h"), Path("/usr/include/linux/io_uring.h")
STRUCTURES = {
    "struct io_sqring_offsets": (uapi.SqOffsets, {"reserved": "resv1", "user_addr": ""}),
    "struct io_cqring_offsets": (uapi.CqOffsets, {"reserved": "resv1", "user_addr": ""}),
    "struct io_uring_params": (uapi.RingParams, {"reserved": "resv"}),
    "struct ublksrv_ctrl_cmd": (
        uapi.ControlCommand,
        {"dev_path_len": "", "pad": "", "reserved": ""},
    ),
    "struct ublksrv_ctrl_dev_info": (uapi.DeviceInfo, {"owner_uid": "", "owner_gid": ""}),
    "struct ublk_param_basic": (uapi.BasicParams, {}),
}
"""Our names, with the kernel's where they differ; "" for one that older headers call otherwise."""
NUMBERS = {
    "IORING_OP_POLL_ADD": uapi.OP_POLL_ADD,
    "IORING_OP_URING_CMD": uapi.OP_URING_CMD,
    "IORING_SETUP_SQE128": uapi.Setup.SQE128,
    "IORING_SETUP_CQSIZE": uapi.Setup.CQSIZE,
    "IORING_SETUP_CLAMP": uapi.Setup.CLAMP,
    "IORING_SETUP_SINGLE_ISSUER": uapi.Setup.SINGLE_ISSUER,
    "IORING_OFF_SQES": uapi.OFF_SQES,
    "UBLK_F_USER_RECOVERY": uapi.Feature.USER_RECOVERY,
    "UBLK_F_USER_RECOVERY_REISSUE": uapi.Feature.USER_RECOVERY_REISSUE,
    "UBLK_ATTR_READ_ONLY": uapi.ATTR_READ_ONLY,
    "UBLK_PARAM_TYPE_BASIC": uapi.PARAM_TYPE_BASIC,
    "UBLK_IO_OP_READ": uapi.OP_READ,
    "UBLK_IO_OP_FLUSH": uapi.OP_FLUSH,
    "UBLK_IO_RES_ABORT": uapi.ABORTED,
    "UBLK_MAX_QUEUE_DEPTH": uapi.QUEUE_DEPTH_MAX,
    "_IOWR('u', 0x04, struct ublksrv_ctrl_cmd)": uapi.Control.ADD_DEV,
    "_IOR('u', 0x02, struct ublksrv_ctrl_cmd)": uapi.Control.GET_DEV_INFO,
    "_IOR('u', 0x13, struct ublksrv_ctrl_cmd)": uapi.Control.GET_FEATURES,
    "_IOWR('u', 0x20, struct ublksrv_io_cmd)": uapi.IO_FETCH,
    "_IOWR('u', 0x21, struct ublksrv_io_cmd)": uapi.IO_COMMIT_AND_FETCH,
    "sizeof(struct ublksrv_io_desc)": uapi.IO_DESCRIPTION.size,
    "sizeof(struct ublksrv_io_cmd)": uapi.IO_COMMAND.size,
    "sizeof(struct io_uring_cqe)": uapi.CQE_SIZE,
    "offsetof(struct io_uring_sqe, cmd)": uapi.SQE_COMMAND.size,
    "offsetof(struct io_uring_sqe, user_data)": 32,
}


def test_layouts_and_numbers_are_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None or not all(path.exists() for path in HEADERS):
        pytest.skip("no compiler, or no kernel headers")
    wanted = {name: int(value) for name, value in NUMBERS.items()}
    for structure, (ours, names) in STRUCTURES.items():
        wanted[f"sizeof({structure})"] = ctypes.sizeof(ours)
        for name, _ in ours._fields_:
            theirs = names.get(name, name)
            if theirs:
                wanted[f"offsetof({structure}, {theirs})"] = getattr(ours, name).offset
    lines = [f'printf("%lld\\n", (long long)({name}));' for name in wanted]
    includes = (
        "stddef.h",
        "stdio.h",
        "errno.h",
        "sys/ioctl.h",
        *("linux/" + p.name for p in HEADERS),
    )
    source = "".join(f"#include <{name}>\n" for name in includes)
    (tmp_path / "t.c").write_text(source + "int main(void) {" + "\n".join(lines) + "return 0; }")
    subprocess.run([compiler, "-o", tmp_path / "t", tmp_path / "t.c"], check=True, timeout=60)
    said = subprocess.run([tmp_path / "t"], capture_output=True, text=True, check=True, timeout=10)
    assert dict(zip(wanted, map(int, said.stdout.split()), strict=True)) == wanted


def test_the_descriptions_of_a_queue_fill_whole_pages() -> None:
    assert uapi.descriptions_size(1) == uapi.descriptions_size(170) == 4096
    assert uapi.descriptions_size(171) == 8192
    assert uapi.descriptions_offset(2) == 2 * 4096 * 24
