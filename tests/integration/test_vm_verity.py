"""Guests that verify their disk: right ones come up, and a flipped bit anywhere is never read.

Disks that are not what their root hash says cannot come from our block server, which verifies by
itself. They are copies, given to `imgsnap.vm.run` as the disk that a hostile loader would serve.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgsnap.errors import IntegrityError
from imgsnap.formats.erofs_read import ErofsReader
from imgsnap.formats.verity import VerityLayout
from imgsnap.mount.container import Command, Identity
from imgsnap.vm import run
from imgsnap.vm.image_files import files_on
from imgsnap.vm.machine import GuestStopped
from imgsnap.vm.run import TimeLine, Wanted
from imgsnap.vm.verity import VerifiedRoot
from tests.integration.test_vm import RUN, WALK, fetched, reference_sums, shell, tars, walked
from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.guest import BOOT_TRIES, kit
from tests.support.image_builder import image, write_layout
from tests.support.images import Bytes
from tests.support.node import node_daemon
from tests.support.samples import many_files, noise
from tests.support.verity import BLOCK
from tests.support.vm import Vm

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"


@pytest.fixture
def vm(cli: Cli) -> Iterator[Vm]:
    with node_daemon(cli) as node:
        yield Vm(node, kit())


@pytest.fixture
def remote(vm: Vm, registry: DockerRegistry, name: str, tmp_path: Path) -> str:
    """A snapshot with a hash tree in a registry, of which this node has nothing."""
    write_layout(tmp_path / "image", image(*tars(), run=RUN))
    reference = f"{registry.address}/{name}:snap"
    vm.cli.convert(f"oci:{tmp_path}/image", reference, HTTP, "--verity")
    return reference


def test_every_file_is_right_and_the_disk_is_fetched_lazily(
    vm: Vm, remote: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    root_hash = vm.cli("inspect", HTTP, remote, "--format", "json").json["verity"]["rootHash"]
    arguments = (HTTP, "--prefetch", "off", "--root-hash", root_hash.upper(), "--report", report)
    asked = "id -u; cat /sys/block/dm-0/dm/name /sys/block/dm-0/ro"
    result = vm.run(*arguments, remote, *shell(asked))
    assert (result.code, result.out.split()) == (0, ["1234", "root", "1"]), result.err
    assert 0 < fetched(report) < 6_000_000, "half of the noise nobody read"
    result = vm.run(HTTP, remote, *shell(WALK))
    assert result.code == 0, result.err
    assert walked(result.out) == reference_sums()
    assert vm.left() == []


def test_other_root_hashes_are_refused(vm: Vm, remote: str, tmp_path: Path) -> None:
    kernel = ["--kernel", vm.kit.kernel, "--modules", vm.kit.modules]
    said = vm.fails(3, *kernel, HTTP, "--root-hash", "12" * 32, remote)
    assert "root hash is" in said
    vm.cli.convert(f"oci:{tmp_path}/image", "store:plain")
    said = vm.fails(3, *kernel, "--root-hash", "12" * 32, "store:plain")
    assert "no hash tree" in said
    assert "past dm-verity" in vm.fails(8, *kernel, HTTP, "--dax", remote)
    assert "64 hex digits" in vm.fails(2, *kernel, "--root-hash", "12", "store:plain")
    assert vm.left() == []


def test_a_recorded_boot_has_the_tree_in_its_pack(vm: Vm, remote: str, tmp_path: Path) -> None:
    trace, report = tmp_path / "boot.json", tmp_path / "report.json"
    script = "sha256sum /usr/text"
    first = vm.run(HTTP, "--trace", trace, remote, *shell(script))
    assert first.code == 0, first.err
    layers = vm.cli("inspect", HTTP, remote, "--format", "json").json["layers"]
    recorded = set(json.loads(trace.read_text())["extents"])
    assert recorded - {layer["extentID"] for layer in layers}, "blocks of the hash tree"
    vm.cli("optimize", HTTP, remote, "--trace", trace)
    vm.cli("cache", "prune", "--all")
    second = vm.run(HTTP, "--prefetch", "off", "--report", report, remote, *shell(script))
    assert (second.code, second.out) == (0, first.out), second.err
    reads = json.loads(report.read_text())["reads"]
    assert reads["pack"]["bytes"] > 0


def test_kernels_without_dm_verity_are_found_before_the_boot(vm: Vm, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", image(*tars()[:1], run=RUN))
    vm.cli.convert(f"oci:{tmp_path}/image", "store:sealed", "--verity")
    modules = tmp_path / "modules"
    (modules / "kernel").mkdir(parents=True)
    for path in vm.kit.modules.resolve().rglob("*.ko*"):
        if not path.name.startswith("dm-verity"):
            (modules / "kernel" / path.name).symlink_to(path)
    (modules / "modules.builtin").write_bytes((vm.kit.modules / "modules.builtin").read_bytes())
    kernel = ["--kernel", vm.kit.kernel, "--modules", modules]
    assert "CONFIG_DM_VERITY" in vm.fails(8, *kernel, "store:sealed")
    said = vm.fails(8, *kernel, "--root-hash", "12" * 32, "store:absent")
    assert "CONFIG_DM_VERITY" in said, "before anything is attached"
    assert vm.left() == []


# Hostile disks -----------------------------------------------------------------------------------


class Disk:
    """A copy of a snapshot's device, and boots from it."""

    def __init__(self, vm: Vm, directory: Path) -> None:
        self._directory = directory
        # So many names that the root directory has blocks of its own.
        names = many_files(count=400, size=1)
        write_layout(directory / "image", image(*tars(), names, run=RUN))
        vm.cli.convert(f"oci:{directory}/image", "store:app", "--verity")
        device = Path(vm.cli("attach", "store:app").out.strip())
        self.path = directory / "disk"
        self.original = device.read_bytes()
        vm.cli("detach", device)
        verity = vm.cli("inspect", "store:app", "--format", "json").json["verity"]
        self.data_blocks, self.root_hash = verity["dataBlocks"], verity["rootHash"]
        self._wanted = Wanted(256, 1, vm.kit.kernel, vm.kit.modules, limit_s=120, emulate=True)
        self._qemu = vm.kit.qemu

    def flip(self, place: int) -> None:
        """One bit, in an otherwise right disk."""
        disk = bytearray(self.original)
        disk[place] ^= 0x10
        self.path.write_bytes(disk)

    def place_of(self, path: bytes, offset: int) -> int:
        """Where a byte of a file is on the disk."""
        reader = ErofsReader(Bytes(self.original))
        inode = reader.resolve(path)
        return inode.block * BLOCK + offset

    def boot(self, script: str, root: VerifiedRoot) -> tuple[int, str]:
        for attempt in itertools.count(1):
            output = bytearray()
            tools = run.with_verity(run.prepare(self._wanted, self._directory, print), self._wanted)
            args = ("/bin/busybox", "sh", "-c", script)
            command = Command(args, ("PATH=/bin",), "/", Identity(0, 0, ()), terminal=False)
            line = TimeLine()
            try:
                status = run.run(
                    tools,
                    self._wanted,
                    self.path,
                    root,
                    command,
                    self._directory,
                    print,
                    line,
                    output.extend,
                )
                return status, output.decode(errors="replace")
            except GuestStopped as error:  # the emulator's own faults
                if attempt == BOOT_TRIES or "did not come up" in str(error):
                    raise
        raise AssertionError

    @property
    def root(self) -> VerifiedRoot:
        return VerifiedRoot(VerityLayout(self.data_blocks), self.root_hash)


@pytest.fixture
def disk(vm: Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setenv("PATH", vm.env["PATH"])
    return Disk(vm, tmp_path)


def test_a_flipped_block_of_a_file_is_an_error_and_never_read(disk: Disk) -> None:
    """The block before it and the next page are right, the block itself cannot be had."""
    wrong = 5_000_000
    disk.flip(disk.place_of(b"/large", wrong))
    block = wrong // BLOCK
    read = "dd if=/large bs=4096 count=1 skip=%d 2>/dev/null | sha256sum"
    script = f"{read % (block - 40)}; cat /large >/dev/null && echo read; {read % block}; " + (
        "cat /large | wc -c; dmesg | grep -c 'data block .* is corrupted'; cat /usr/text | wc -c"
    )
    status, output = disk.boot(script, disk.root)
    lines = [line for line in output.splitlines() if line]
    content = noise(12_000_000, 9)
    near = (block - 40) * BLOCK
    assert hashlib.sha256(content[near : near + BLOCK]).hexdigest() in lines[0]
    assert "I/O error" in lines[1] or "Input/output error" in lines[1]
    assert "read" not in lines
    nothing = hashlib.sha256(b"").hexdigest()
    assert any(nothing in line for line in lines[2:4]), lines
    sizes = [int(line) for line in lines if line.strip().isdigit()]
    assert sizes[0] <= wrong - wrong % BLOCK and sizes[1] >= 1 and sizes[2] == 100_000, lines
    assert status == 0


def test_a_flipped_superblock_is_refused(disk: Disk) -> None:
    disk.flip(1030)
    with pytest.raises(IntegrityError, match="not what its root hash says") as caught:
        disk.boot("echo up", disk.root)
    assert caught.value.exit_code == 3 and caught.value.hint
    with pytest.raises(IntegrityError, match="block 0"):
        files_on(disk.path, disk.root)("/etc/passwd")


def test_a_flipped_root_directory_is_refused(disk: Disk) -> None:
    place = disk.place_of(b"", 100)
    assert place > BLOCK, "not the superblock's block"
    disk.flip(place)
    with pytest.raises(IntegrityError, match="not what its root hash says"):
        disk.boot("echo up", disk.root)


def test_a_flipped_top_of_the_tree_is_refused(disk: Disk) -> None:
    disk.flip((disk.data_blocks + 1) * BLOCK + 3)
    with pytest.raises(IntegrityError, match="not what its root hash says"):
        disk.boot("echo up", disk.root)


def test_another_root_hash_is_refused(disk: Disk) -> None:
    """By the guest itself: whatever the host believes."""
    disk.path.write_bytes(disk.original)
    other = VerifiedRoot(disk.root.layout, "12" * 32)
    with pytest.raises(IntegrityError, match="not what its root hash says"):
        disk.boot("echo up", other)


def test_a_disk_that_is_too_short_for_its_tree_does_not_come_up(disk: Disk) -> None:
    disk.path.write_bytes(disk.original[: disk.data_blocks // 2 * BLOCK])
    with pytest.raises(GuestStopped, match="dm-verity"):
        disk.boot("echo up", disk.root)
