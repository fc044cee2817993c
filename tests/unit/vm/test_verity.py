"""The program that maps a guest's verified disk: its bytes, decoded again; and who is refused."""

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.errors import IntegrityError, InvalidArgument
from imgsnap.formats.snapshot_config import DeviceExtent, VerityConfig
from imgsnap.formats.verity import VerityLayout
from imgsnap.vm.initramfs import is_static
from imgsnap.vm.verity import (
    DM_IOCTL,
    DM_TARGET_SPEC,
    DmIoctl,
    DmTargetSpec,
    VerifiedRoot,
    check_root_hash,
    table_record,
    verified_root,
    verity_program,
)
from tests.unit.test_format_docs import TYPES, members
from tests.unit.test_snapshot_config import CONFIG

HASH = "5a" * 32
ROOT = VerifiedRoot(VerityLayout(38_822), HASH)
LINE = f"1 /dev/vda /dev/vda 4096 4096 38822 38823 sha256 {HASH} -"


def test_the_table_is_what_the_kernel_documents() -> None:
    assert ROOT.layout.table("/dev/vda", HASH) == f"0 {38_822 * 8} verity {LINE}"
    record = table_record(ROOT)
    header = DmIoctl(*DM_IOCTL.unpack_from(record))
    assert (header.major, header.minor, header.data_size) == (4, 0, len(record))
    assert (header.data_start, header.target_count, header.flags) == (312, 1, 1)
    assert header.name.rstrip(b"\0") == b"root" and not any(header.uuid)
    target = DmTargetSpec(*DM_TARGET_SPEC.unpack_from(record, header.data_start))
    assert (target.sector_start, target.length) == (0, 38_822 * 8)
    assert target.target_type == b"verity".ljust(16, b"\0")
    assert header.data_start + target.next == len(record) and target.next % 8 == 0
    parameters = record[header.data_start + DM_TARGET_SPEC.size :]
    assert parameters.rstrip(b"\0").decode() == LINE and parameters.endswith(b"\0")


@pytest.mark.parametrize(("record", "kind"), [(DM_IOCTL, DmIoctl), (DM_TARGET_SPEC, DmTargetSpec)])
def test_the_records_are_as_their_tables_say(record: struct.Struct, kind: type) -> None:
    rows = re.findall(
        r"^ +(\d+) +(\d+) +(?:([iu]\d+|bytes) +)?(\w+|\(reserved\))", kind.__doc__, re.M
    )
    documented = [(int(a), int(b), TYPES[c] if c else "x", d) for a, b, c, d in rows]
    assert documented == members(record, kind._fields)


def calls(program: bytes) -> list[tuple[int, ...]]:
    """The system calls of a program none of which fails: number, rdi, rsi, rdx."""
    entry, base = struct.unpack_from("<QQ", program, 24)[0], 0x400000
    at, found, registers, number = entry - base, [], {}, 0
    while not found or found[-1][0] != 60:
        if program[at : at + 2] in (b"\x48\xbf", b"\x48\xbe", b"\x48\xba"):  # movabs
            registers[program[at + 1]] = int.from_bytes(program[at + 2 : at + 10], "little")
            at += 10
        elif program[at] == 0xB8:  # mov eax
            number, at = int.from_bytes(program[at + 1 : at + 5], "little"), at + 5
        elif program[at : at + 2] == b"\x0f\x05":  # syscall
            found.append((number, *(registers.get(name, 0) for name in (0xBF, 0xBE, 0xBA))))
            at += 2
        else:  # test rax, rax; jns
            assert program[at : at + 4] == b"\x48\x85\xc0\x79"
            at += 5 + program[at + 4]
    return found


def test_the_program_makes_five_calls() -> None:
    program = verity_program(ROOT)
    assert is_static(program) and program == verity_program(ROOT)

    def at(address: int, length: int) -> bytes:
        return program[address - 0x400000 :][:length]

    close, opened, create, load, resume, end = calls(program)
    assert close[:2] == (3, 0) and end[:2] == (60, 0)
    assert opened[0] == 2 and at(opened[1], 20) == b"/dev/mapper/control\0" and opened[2] == 2
    size = 312 << 16 | 3 << 30 | 0xFD00  # linux/dm-ioctl.h, asm-generic/ioctl.h
    for call, command in ((create, 3), (load, 9), (resume, 6)):
        assert call[:3] == (16, 0, size | command)
    record = table_record(ROOT)
    assert at(load[3], len(record)) == record
    plain = at(create[3], 312)
    assert at(resume[3], 312) == plain
    assert DmIoctl(*DM_IOCTL.unpack(plain))._replace(name=b"") == DmIoctl(
        4, 0, 0, 312, 312, 0, 0, 0, 0, 0, b"", bytes(129)
    )
    # Each call has a record of its own: the kernel writes its answers there.
    assert len({create[3], load[3], resume[3]}) == 3


def test_without_device_mapper_it_says_so(tmp_path: Path) -> None:
    path = tmp_path / "verity"
    path.write_bytes(verity_program(ROOT))
    path.chmod(0o755)
    empty = ["unshare", "--user", "--map-root-user", "chroot", str(tmp_path), "/verity"]
    done = subprocess.run(empty, capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (126, b"imgsnap: cannot open /dev/mapper/control\n")


def test_which_snapshots_are_taken() -> None:
    sealed = replace(CONFIG, verity=VerityConfig(HASH, DeviceExtent("00" * 32, 7, 2)))
    assert verified_root(CONFIG, None) is None
    wanted = VerifiedRoot(VerityLayout(7), HASH)
    assert verified_root(sealed, None) == wanted == verified_root(sealed, HASH)
    with pytest.raises(IntegrityError, match=f"is {HASH}, not 1212"):
        verified_root(sealed, "12" * 32)
    with pytest.raises(IntegrityError, match="no hash tree"):
        verified_root(CONFIG, HASH)


def test_root_hashes_as_users_write_them() -> None:
    assert check_root_hash("AB" * 32) == "ab" * 32
    for text in ("", "ab", "ab" * 33, "zz" * 32, "ab" * 31 + "a\n", "sha256:" + "ab" * 32):
        with pytest.raises(InvalidArgument):
            check_root_hash(text)
