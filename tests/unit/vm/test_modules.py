"""Guest kernels and their modules: what is there, what is needed, and in which order."""

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from imgsnap.errors import FormatError, InvalidArgument, LimitExceeded, NotFound, Unsupported
from imgsnap.vm import kernel, modules
from imgsnap.vm.kernel import BASE, find_kernel, judge, kernel_version
from imgsnap.vm.modules import ModuleTree, dependencies

PACK = {
    ".ko": bytes,
    ".ko.gz": gzip.compress,
    ".ko.xz": lzma.compress,
    ".ko.zst": zstandard.ZstdCompressor().compress,
}


def module(*needs: str) -> bytes:
    return b"\x7fELF\0name=x\0depends=" + ",".join(needs).encode() + b"\0retpoline=Y\0"


def tree(root: Path, files: dict[str, bytes], builtin: str = "") -> ModuleTree:
    (root / "kernel/fs").mkdir(parents=True)
    for name, data in files.items():
        suffix = name[name.index(".ko") :]
        (root / "kernel/fs" / name).write_bytes(PACK[suffix](data))
    (root / "modules.builtin").write_text(builtin)
    return ModuleTree(root)


def names(found: list[modules.Module]) -> list[str]:
    return [item.name for item in found]


def test_what_a_module_needs_comes_before_it_however_it_is_compressed(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        {
            "virtio-net.ko.xz": module("net_failover", "virtio"),
            "net_failover.ko.zst": module("failover"),
            "failover.ko.gz": module(),
            "alone.ko": module(),
        },
        builtin="kernel/drivers/virtio/virtio.ko\n",
    )
    assert names(found.load_order(["virtio_net", "failover", "alone", "virtio"])) == [
        "failover",
        "net_failover",
        "virtio_net",
        "alone",
    ]
    assert found.has("virtio") and found.has("virtio-net") and not found.has("erofs")
    with pytest.raises(NotFound, match="erofs"):
        found.load_order(["erofs"])


def test_a_renamed_module_is_found_by_either_name(tmp_path: Path) -> None:
    """crypto/sha256_generic.c became crypto/sha256.c."""
    older = tree(tmp_path / "old", {"sha256_generic.ko": module()})
    newer = tree(tmp_path / "new", {"sha256.ko": module("libsha256"), "libsha256.ko": module()})
    builtin = tree(tmp_path / "builtin", {}, builtin="kernel/crypto/sha256.ko\n")
    neither = tree(tmp_path / "none", {"other.ko": module()})
    for kernel_, loaded in (
        (older, ["sha256_generic"]),
        (newer, ["libsha256", "sha256"]),
        (builtin, []),
    ):
        assert kernel_.has("sha256_generic")
        assert names(kernel_.load_order(["sha256_generic"])) == loaded
    assert not neither.has("sha256_generic")


def test_damaged_modules_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tree(tmp_path, {"a.ko": module("b"), "b.ko": module("a"), "large.ko.gz": bytes(9999)})
    with pytest.raises(FormatError, match="depend on each other"):
        found.load_order(["a"])
    with pytest.raises(FormatError, match="not an ELF"):
        found.load_order(["large"])
    monkeypatch.setattr(modules, "MODULE_MAX", 9998)
    with pytest.raises(LimitExceeded):
        found.load_order(["large"])
    for name in ("c.ko.xz", "d.ko.gz", "e.ko.zst"):
        path = tmp_path / name
        path.write_bytes(b"nonsense")
        with pytest.raises(FormatError, match="decompressed"):
            modules.read_module(path)
    assert dependencies(b"\x7fELF\0depends=") == []


def bzimage(path: Path, version: str) -> Path:
    head = bytearray(0x1000)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{version} (builder@host) #1".encode() + b"\0"
    head[0x500 : 0x500 + len(text)] = text
    path.write_bytes(head)
    return path


def test_a_kernel_without_modules_is_judged_by_its_config(tmp_path: Path) -> None:
    image = bzimage(tmp_path / "vmlinuz", "0.0.1-none")
    assert kernel_version(image) == "0.0.1-none"
    with pytest.raises(Unsupported, match="nothing tells"):
        judge(image, None, BASE)
    config = tmp_path / "config-0.0.1-none"
    config.write_text("\n".join(f"{option}=y" for option in BASE.values()))
    assert judge(image, None, BASE).modules == ()
    config.write_text("CONFIG_EROFS_FS=m\nCONFIG_VIRTIO_BLK=y\n")
    with pytest.raises(Unsupported, match="CONFIG_VIRTIO_MMIO, CONFIG_EROFS_FS, CONFIG_OVERLAY"):
        judge(image, None, BASE)


def test_the_newest_installed_kernel_that_can_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "installed", lambda: installed)
    installed: list[Path] = []
    with pytest.raises(NotFound, match="no kernel"):
        find_kernel(None, None, BASE)
    for version in ("0.9.0", "0.10.0", "0.11.0"):
        bzimage(tmp_path / f"vmlinuz-{version}", version)
    (tmp_path / "config-0.10.0").write_text("\n".join(f"{option}=y" for option in BASE.values()))
    monkeypatch.undo()
    installed = kernel.installed(tmp_path)
    assert [path.name for path in installed] == [
        "vmlinuz-0.11.0",
        "vmlinuz-0.10.0",
        "vmlinuz-0.9.0",
    ]
    monkeypatch.setattr(kernel, "installed", lambda: installed)
    assert find_kernel(None, None, BASE).version == "0.10.0"


def test_what_is_no_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"MZ")
    for name in ("short", "../../../../../bin/ls"):
        with pytest.raises((InvalidArgument, NotFound)):
            kernel_version(tmp_path / name)
