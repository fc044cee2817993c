"""The cpio archive, read back by busybox, and the launcher's ELF."""

import subprocess
from pathlib import Path

import pytest

from imgsnap.errors import Unsupported
from imgsnap.mount.container import Command, Identity
from imgsnap.vm import initramfs
from imgsnap.vm.initramfs import directory, file, is_static, link
from imgsnap.vm.launcher import launcher
from imgsnap.vm.modules import Module

BUSYBOX = Path("/bin/busybox")


def listing(archive: bytes) -> list[list[str]]:
    done = subprocess.run(
        [BUSYBOX, "cpio", "-tv"], input=archive, capture_output=True, check=True, timeout=20
    )
    return [line.split() for line in done.stdout.decode().splitlines()]


def test_an_archive_is_what_busybox_reads(tmp_path: Path) -> None:
    entries = [directory("a"), file("a/run", b"#!", executable=True), link("a/b", "run")]
    entries += [file(f"a/{'n' * size}", b"x" * size) for size in range(1, 9)]
    raw = initramfs.archive(entries)
    assert raw == initramfs.archive(entries)
    subprocess.run(
        [BUSYBOX, "cpio", "-i", "-d"], input=raw, cwd=tmp_path, check=True, capture_output=True
    )
    assert (tmp_path / "a/b").resolve() == tmp_path / "a/run"
    assert (tmp_path / "a/run").stat().st_mode & 0o777 == 0o755
    for size in range(1, 9):
        assert (tmp_path / f"a/{'n' * size}").read_bytes() == b"x" * size


def test_modules_are_in_loading_order_and_nothing_more_is_there() -> None:
    modules = [Module(name, b"\x7fELF") for name in ("zlast", "afirst")]
    names = [words[-1] for words in listing(initramfs.guest(BUSYBOX, modules))]
    found = [name for name in names if name.startswith("modules/")]
    assert found == ["modules/000-zlast.ko", "modules/001-afirst.ko"]
    assert "init" in names and "bin/busybox" in names


def test_a_busybox_with_libraries_is_refused(tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(Path("/bin/ls").read_bytes())
    with pytest.raises(Unsupported, match="shared libraries"):
        initramfs.guest(tmp_path / "busybox", [])
    (tmp_path / "busybox").write_bytes(b"#!/bin/sh\n")
    with pytest.raises(Unsupported):
        initramfs.guest(tmp_path / "busybox", [])


def test_a_launcher_is_a_static_program_that_refuses_without_privileges(tmp_path: Path) -> None:
    identity = Identity(65534, 65534, (1, 2, 3))
    command = Command(("true",), ("PATH=/bin", "A=b c"), "/a/b", identity, terminal=False)
    program = launcher(command)
    assert is_static(program) and program == launcher(command)
    path = tmp_path / "launch"
    path.write_bytes(program)
    path.chmod(0o755)
    enter = ["unshare", "--user"]  # a user that may not chroot, whoever runs the test
    done = subprocess.run([*enter, path], capture_output=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (126, b"imgsnap: cannot enter the image\n")
