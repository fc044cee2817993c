"""An attached device in the words of each VMM. Text only: nothing is started here.

Sources: qemu-options.hx; Firecracker's src/firecracker/swagger/firecracker.yaml (Drive, Pmem);
Cloud Hypervisor's vmm/src/config.rs; Kata's docs/design/direct-blk-device-assignment.md. They are
held against those by tests/golden/vmm-apis.json.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from imgsnap.errors import InvalidArgument

ID = "rootfs"
"""The device's name in the VM's configuration."""


def qemu(path: Path) -> str:
    """Options. Read through the kernel's page cache, which all VMs share: not with O_DIRECT."""
    file = _plain(path, "QEMU")
    backend = f"driver=raw,node-name={ID},read-only=on,file.driver=file,file.filename={file}"
    return f"-blockdev {backend} -device virtio-blk-pci,drive={ID}"


def qemu_microvm(path: Path) -> str:
    """As `qemu`, for `-M microvm`, which has virtio-mmio and no PCI bus."""
    return qemu(path).replace("virtio-blk-pci", "virtio-blk-device")


def firecracker(path: Path) -> str:
    """The body of `PUT /drives/rootfs`, and an element of `drives` in a configuration file."""
    return _json(
        {
            "drive_id": ID,
            "path_on_host": str(path),
            "is_root_device": True,
            "is_read_only": True,
            "cache_type": "Unsafe",
            "io_engine": "Sync",
        }
    )


def firecracker_pmem(path: Path) -> str:
    """The body of `PUT /pmem/rootfs`. The file has to be complete in the node's cache: a page that
    cannot be fetched ends the VM."""
    return _json({"id": ID, "path_on_host": str(path), "root_device": True, "read_only": True})


def cloud_hypervisor(path: Path) -> str:
    """Options."""
    return f"--disk path={_plain(path, 'Cloud Hypervisor')},readonly=on,image_type=raw,id={ID}"


def cloud_hypervisor_pmem(path: Path) -> str:
    """Options; without `discard_writes` it opens the file for writing. As `firecracker_pmem`, the
    file has to be complete in the node's cache."""
    return f"--pmem file={_plain(path, 'Cloud Hypervisor')},discard_writes=on,id={ID}"


def kata(path: Path) -> str:
    """What `kata-ctl direct-volume add` and `kata-runtime direct-volume add --mount-info` take.

    Kata's runtime in Rust takes no other type than "directvol"; that in Go does not look at it.
    """
    return _json(
        {"volume-type": "directvol", "device": str(path), "fstype": "erofs", "options": ["ro"]}
    )


FORMATS: Mapping[str, Callable[[Path], str]] = {
    "qemu": qemu,
    "qemu-microvm": qemu_microvm,
    "firecracker": firecracker,
    "firecracker-pmem": firecracker_pmem,
    "cloud-hypervisor": cloud_hypervisor,
    "cloud-hypervisor-pmem": cloud_hypervisor_pmem,
    "kata": kata,
}
"""By the name that `imgsnap attach --format` has for it. Each raises InvalidArgument."""
MAPPED = ("firecracker-pmem", "cloud-hypervisor-pmem")
"""Those that map a file: a disk has no size for them."""


def _plain(path: Path, vmm: str) -> str:
    """A path that needs no quoting among a VMM's comma-separated options."""
    text = str(path)
    if any(character in text for character in ",\"' []") or not text.isprintable():
        raise InvalidArgument(
            f"{text!r} has characters that {vmm} takes as syntax",
            hint="choose another --run-dir",
        )
    return text


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False)
