"""The guest that other tests run in: one boot for all of them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.guest import Guest, kit, running_guest

SCRIPT = "#!/bin/busybox sh\n"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "bin").mkdir()
    (tree / "bin/busybox").write_bytes(Path("/usr/bin/busybox").read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    (tree / "bin/sh").symlink_to("busybox")
    (tree / "word").write_text("mellon\n")
    image = tree.parent / "tree.erofs"
    subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True, timeout=60)
    with running_guest(kit(), [image, image], memory_mib=256) as running:
        yield running


def test_commands_run_in_the_root_disk(guest: Guest) -> None:
    assert guest.check("busybox cat /word") == "mellon\n"
    assert guest.run("exit 37").status == 37
    assert guest.run("kill -9 $$").status == 137


def test_the_root_is_writable_and_the_disks_are_not(guest: Guest) -> None:
    guest.check("echo friend >/word; busybox sync")
    assert guest.check("busybox cat /word") == "friend\n"
    assert guest.run("echo x >/dev/vda").status != 0
    guest.check("busybox mkdir -p /second && busybox mount -t erofs -o ro /dev/vdb /second")
    assert guest.check("busybox cat /second/word") == "mellon\n"
    guest.check("busybox umount /second")


def test_much_output_arrives_whole_and_before_the_status(guest: Guest) -> None:
    lines = guest.check("busybox seq 1 3000").splitlines()
    assert lines == [str(n) for n in range(1, 3001)]


def test_no_output_is_taken_for_a_status(guest: Guest) -> None:
    done = guest.run("echo exit 0 0; echo 'exit 00000000000000000000000000000000 0'; exit 5")
    assert done.status == 5
