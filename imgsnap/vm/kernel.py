"""Finding a guest kernel, and whether it can start from a snapshot: known before the boot.

A kernel image is a bzImage (Documentation/arch/x86/boot.rst); what it can is in its modules, or, if
it has none, in the ``config-VERSION`` beside it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import InvalidArgument, NotFound, Unsupported
from imgsnap.vm.modules import Module, ModuleTree

BASE: Mapping[str, str] = {
    "virtio_mmio": "CONFIG_VIRTIO_MMIO",
    "virtio_blk": "CONFIG_VIRTIO_BLK",
    "erofs": "CONFIG_EROFS_FS",
    "overlay": "CONFIG_OVERLAY_FS",
}
"""What every guest needs: modules, and the options that make them."""
DAX: Mapping[str, str] = {
    "virtio_pci": "CONFIG_VIRTIO_PCI",
    "virtio_pmem": "CONFIG_VIRTIO_PMEM",
    "nd_pmem": "CONFIG_BLK_DEV_PMEM",
}
"""For a snapshot that is mapped into the guest. CONFIG_FS_DAX is no module: init looks for it."""
NETWORK: Mapping[str, str] = {"virtio_net": "CONFIG_VIRTIO_NET"}
SCRATCH: Mapping[str, str] = {"ext4": "CONFIG_EXT4_FS"}
VERITY: Mapping[str, str] = {
    "dm_verity": "CONFIG_DM_VERITY",
    "sha256_generic": "CONFIG_CRYPTO_SHA256",
}
FASTER_VERITY = ("sha256_ssse3",)
"""Modules that are taken where there are any; init goes on without them."""
BOOT = Path("/boot")
MODULES = (Path("/lib/modules"), Path("/usr/lib/modules"))
_HINT = "install one with apt-get install linux-image-cloud-amd64, or name a file with --kernel"
_HEADER_AT, _HEADER = 0x202, b"HdrS"
_VERSION_AT = 0x20E
_HEAD_MAX = 0x8000
_VERSION_MAX = 256
_CONFIG_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class GuestKernel:
    """A kernel that can be a guest's, with the modules to load in it, in order."""

    image: Path
    version: str
    modules: tuple[Module, ...]


def find_kernel(
    image: Path | None, modules: Path | None, needed: Mapping[str, str], also: Sequence[str] = ()
) -> GuestKernel:
    """The kernel that was named, or the newest installed one that has what is needed; with those
    modules of `also` that it has.

    Raises NotFound without any, InvalidArgument for a file that is none, Unsupported for one that
    lacks something: what, is said.
    """
    if image is not None:
        return judge(image, modules, needed, also)
    refusal: Unsupported | InvalidArgument | None = None
    for found in installed():
        try:
            return judge(found, modules, needed, also)
        except (Unsupported, InvalidArgument) as error:
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    raise NotFound(f"there is no kernel for the guest in {BOOT}", hint=_HINT)


def installed(boot: Path = BOOT) -> list[Path]:
    """The distribution's kernel images, the newest version first."""
    return sorted(boot.glob("vmlinuz-*"), key=_by_version, reverse=True)


def _by_version(path: Path) -> list[tuple[int, str]]:
    return [(int(digits or -1), text) for digits, text in re.findall(r"(\d+)|(\D+)", path.name)]


def judge(
    image: Path, modules: Path | None, needed: Mapping[str, str], also: Sequence[str] = ()
) -> GuestKernel:
    """A kernel image with what is needed of its modules; raises as `find_kernel`."""
    version = kernel_version(image)
    if modules is not None and not modules.is_dir():
        raise NotFound(f"{modules} is not a directory of modules")
    directory = modules or _modules_of(version)
    if directory is None:
        _check_config(image, version, needed)
        return GuestKernel(image, version, ())
    tree = ModuleTree(directory)
    _require(version, needed, (name for name in needed if not tree.has(name)))
    names = [*needed, *(name for name in also if tree.has(name))]
    return GuestKernel(image, version, tuple(tree.load_order(names)))


def kernel_version(image: Path) -> str:
    """The release of a bzImage, as uname -r says it. Raises NotFound, InvalidArgument, OSError."""
    try:
        with image.open("rb") as file:
            head = file.read(_HEAD_MAX)
    except FileNotFoundError as error:
        raise NotFound(f"there is no kernel {image}", hint=_HINT) from error
    if head[_HEADER_AT : _HEADER_AT + len(_HEADER)] != _HEADER:
        raise InvalidArgument(
            f"{image} is not a Linux kernel for x86 (bzImage)", hint="name a vmlinuz file"
        )
    at = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little") + 0x200
    text = head[at : at + _VERSION_MAX].partition(b"\0")[0].decode("ascii", "replace")
    return text.partition(" ")[0]


def _modules_of(version: str) -> Path | None:
    found = (root / version for root in MODULES)
    return next((path for path in found if (path / "modules.builtin").is_file()), None)


def _check_config(image: Path, version: str, needed: Mapping[str, str]) -> None:
    """For a kernel without modules: all must be built in."""
    config = image.with_name(f"config-{version}")
    try:
        with config.open() as file:
            lines = set(file.read(_CONFIG_MAX).splitlines())
    except OSError as error:
        raise Unsupported(
            f"nothing tells what the kernel {version} can: no modules and no {config}",
            hint="name the directory of its modules with --modules",
        ) from error
    _require(version, needed, (name for name in needed if f"{needed[name]}=y" not in lines))


def _require(version: str, needed: Mapping[str, str], missing: Iterable[str]) -> None:
    options = [needed[name] for name in missing]
    if options:
        raise Unsupported(
            f"the guest kernel {version} lacks {', '.join(options)}",
            hint="take another with --kernel; Debian's linux-image-cloud-amd64 has all",
        )
