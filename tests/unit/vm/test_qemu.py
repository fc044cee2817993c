"""QEMU's command line, and what is known of the machine before a boot."""

from pathlib import Path

import pytest

from imgsnap.errors import InvalidArgument, ResourceExhausted
from imgsnap.vm import kvm, run
from imgsnap.vm.kernel import BASE, DAX
from imgsnap.vm.qemu import Accelerator, Boot, Drive, Hardware, command_line, host_tsc_khz

BOOT = Boot(Path("/boot/vmlinuz"), Path("/tmp/i.cpio"), ("imgsnap.scratch=/dev/vdb",))


def value_of(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_only_a_scratch_disk_is_writable_and_no_disk_bypasses_the_page_cache() -> None:
    drives = (Drive(Path("/a,b/layer.erofs")), Drive(Path("/s"), read_only=False))
    hardware = Hardware(Accelerator.EMULATION, 256, 2, drives, tap="tap0")
    found = command_line("qemu", hardware, BOOT, 5, 6)
    disks = [found[at + 1] for at, word in enumerate(found) if word == "-drive"]
    assert "readonly=on" in disks[0] and disks[0].endswith("file=/a,,b/layer.erofs")
    assert "readonly" not in disks[1]
    assert not [disk for disk in disks if "cache=none" in disk or "direct" in disk]
    assert (value_of(found, "-m"), value_of(found, "-smp")) == ("256M", "2")
    assert "imgsnap.scratch=/dev/vdb" in value_of(found, "-append").split()
    assert "ifname=tap0" in value_of(found, "-netdev")
    assert "nomodule" not in value_of(found, "-append")


def test_an_inherited_file_is_named_by_its_set() -> None:
    drives = (Drive(Path("/image"), fd=9), Drive(Path("/s"), read_only=False))
    found = command_line("qemu", Hardware(Accelerator.KVM, drives=drives), BOOT, 5, 6)
    assert value_of(found, "-add-fd") == "fd=9,set=0" and found.count("-add-fd") == 1
    disks = [found[at + 1] for at, word in enumerate(found) if word == "-drive"]
    assert disks[0].endswith("readonly=on,file=/dev/fdset/0") and disks[1].endswith("file=/s")


def test_a_mapped_file_is_read_only_and_has_room(tmp_path: Path) -> None:
    path = tmp_path / "layer.erofs"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    scratch = (Drive(Path("/s"), read_only=False),)
    hardware = Hardware(Accelerator.EMULATION, 256, 1, scratch, pmem=path, tap="tap0")
    found = command_line("qemu", hardware, BOOT, 5, 6)
    assert value_of(found, "-M") == "q35", "microvm has no PCI bus, which virtio-pmem is on"
    backend = value_of(found, "-object").split(",")
    assert {"share=on", "readonly=on", f"size={3 << 30}", f"mem-path={path}"} <= set(backend)
    memory, slots, most = value_of(found, "-m").split(",")
    assert (memory, slots) == ("256M", "slots=1")
    assert int(most.removeprefix("maxmem=").rstrip("M")) >= 256 + (3 << 10)
    assert not [word for word in found if word.startswith("virtio") and "-device" in word]


def test_the_fragment_for_firecrackers_kernels_has_all_that_a_guest_needs() -> None:
    path = Path(__file__).parents[3] / "deploy/guest-kernel/firecracker-erofs.config"
    lines = {line for line in path.read_text().splitlines() if not line.startswith("#")}
    needed = {*BASE.values(), *DAX.values(), "CONFIG_FS_DAX", "CONFIG_DM_VERITY"}
    needed -= {"CONFIG_VIRTIO_PCI"}  # Firecracker's devices are on virtio-mmio
    assert {f"{name}=y" for name in needed} <= lines
    assert all(line.endswith("=y") for line in lines if line)


def test_kvm_needs_no_help_with_its_clock() -> None:
    words = value_of(command_line("qemu", Hardware(Accelerator.KVM), BOOT, 5, 6), "-append")
    assert "tsc" not in words and "console=ttyS0" in words


@pytest.mark.parametrize(
    ("text", "khz"),
    [
        ("model name\t: Xeon(R) CPU @ 2.50GHz\ncpu MHz\t\t: 3100.5\n", 2_500_000),
        ("model name\t: AMD EPYC\ncpu MHz\t\t: 2596.124\n", 2_596_124),
        ("processor\t: 0\n", None),
    ],
)
def test_the_rate_of_the_clock(tmp_path: Path, text: str, khz: int | None) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert host_tsc_khz(path) == khz
    assert host_tsc_khz(tmp_path / "absent") is None


def test_kvm_that_is_not_there_or_no_device_is_told(tmp_path: Path) -> None:
    assert "No such file" in (kvm.why_not(tmp_path / "kvm") or "")
    (tmp_path / "kvm").write_text("")
    assert "creates no machine" in (kvm.why_not(tmp_path / "kvm") or "")
    refusals = kvm.Refusals(tmp_path / "state")
    assert not refusals.known()
    refusals.note()
    assert kvm.Refusals(tmp_path / "state").known()


def test_sizes_are_checked() -> None:
    with pytest.raises(InvalidArgument, match="too little"):
        run._check_size(run.Wanted(memory_mib=run.MEMORY_MIN_MIB - 1))
    with pytest.raises(ResourceExhausted):
        run._check_size(run.Wanted(memory_mib=1 << 40))
    with pytest.raises(InvalidArgument, match="scratch"):
        run._check_size(run.Wanted(scratch=1))


def test_a_mapped_disk_takes_some_of_the_guests_memory(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(8 << 30)
    run._check_mapped(run.Wanted(memory_mib=256), path)
    with pytest.raises(InvalidArgument, match="256 MiB"):
        run._check_mapped(run.Wanted(memory_mib=255), path)
