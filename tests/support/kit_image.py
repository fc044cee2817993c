"""The QEMU and the guest kernel of scripts/guest-kit as an image: for a guest that runs guests."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

from imgsnap.vm.modules import ModuleTree
from tests.support.guest import KIT, GuestKit
from tests.support.image_builder import Image, image

ROOT = "/mnt"
"""Where it is to be mounted."""
_MODULES = ("virtio_mmio", "virtio_blk", "erofs", "overlay")
_FIRMWARE = ("bios-microvm.bin", "linuxboot_dma.bin", "pvh.bin", "kvmvapic.bin")
_LIBRARIES = ("qemu/usr/lib/x86_64-linux-gnu", "qemu/lib/x86_64-linux-gnu")


def kit_image(kit: GuestKit) -> Image:
    """`qemu-system-x86_64`, with its libraries, `vmlinuz` and `modules`, at the image's root."""
    program = KIT / "qemu/usr/bin/qemu-system-x86_64"
    script = f'#!/bin/sh\nLD_LIBRARY_PATH={ROOT}/lib exec {ROOT}/qemu -L {ROOT}/share "$@"\n'
    files = {
        "qemu": program.read_bytes(),
        "qemu-system-x86_64": script.encode(),
        "vmlinuz": kit.kernel.resolve().read_bytes(),
        "modules/modules.builtin": (kit.modules / "modules.builtin").read_bytes(),
    }
    files |= {f"lib/{path.name}": path.read_bytes() for path in _libraries(program)}
    for name in _FIRMWARE:
        found = [path for path in (KIT / "qemu/usr/share").glob(f"*/{name}") if path.exists()]
        files |= {f"share/{name}": path.read_bytes() for path in found}
    for module in ModuleTree(kit.modules.resolve()).load_order(_MODULES):
        files[f"modules/kernel/{module.name}.ko"] = module.data
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return image(buffer.getvalue(), compression="")


def _libraries(program: Path) -> set[Path]:
    path = ":".join(str(KIT / name) for name in _LIBRARIES)
    said = subprocess.run(
        ["ldd", program],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    return {Path(word) for word in said.split() if word.startswith("/")}
