"""A guest kernel's modules: which it has, which are built in, and in what order they load.

What a module needs is read from the module itself (``depends=`` in its .modinfo section), not from
modules.dep: a kernel package that was only unpacked has none.
"""

import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import zstandard

from imgsnap.errors import FormatError, LimitExceeded, NotFound

MODULE_MAX = 64 << 20
"""Bytes of one module, decompressed: the largest that distributions ship have some 10 MiB."""
_RECORD = "kernel module"
_DEPENDS = b"\0depends="
_DEPENDS_MAX = 4096
_RENAMED = {"sha256_generic": "sha256"}
"""Modules that newer kernels call otherwise (this one since Linux 6.16)."""
_DEPTH_MAX = 64
"""Modules that need modules; the deepest of Debian's kernels has eight."""


def _open_zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb")))


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


def _open_gzip(path: Path) -> BinaryIO:
    return io.BufferedReader(gzip.open(path))


def _open_xz(path: Path) -> BinaryIO:
    return io.BufferedReader(lzma.open(path))


_OPEN: dict[str, Callable[[Path], BinaryIO]] = {
    ".ko": _open_plain,
    ".ko.gz": _open_gzip,
    ".ko.xz": _open_xz,
    ".ko.zst": _open_zstd,
}


@dataclass(frozen=True, slots=True)
class Module:
    """A module ready to be loaded."""

    name: str
    data: bytes  # decompressed ELF


@dataclass(frozen=True)
class ModuleTree:
    """The directory of one kernel version's modules, such as /lib/modules/6.12.0."""

    directory: Path

    def has(self, name: str) -> bool:
        """Whether the kernel has this module, built in or not."""
        name = self._name(name)
        return name in self.builtin or name in self._paths

    def _name(self, name: str) -> str:
        """What this kernel calls a module."""
        name = _canonical(name)
        renamed = _RENAMED.get(name, name)
        return renamed if renamed in self.builtin or renamed in self._paths else name

    def load_order(self, names: Iterable[str]) -> list[Module]:
        """The modules that these names need, each after those it depends on; none that is built in.

        Raises NotFound for one that the kernel lacks, FormatError and LimitExceeded for a damaged
        file, OSError.
        """
        ordered: dict[str, Module] = {}
        for name in names:
            self._add(self._name(name), ordered, ())
        return list(ordered.values())

    def _add(self, name: str, ordered: dict[str, Module], path: tuple[str, ...]) -> None:
        if name in ordered or name in self.builtin:
            return
        found = self._paths.get(name)
        if found is None:
            raise NotFound(f"the guest kernel has no module {name}: {self.directory}")
        if name in path or len(path) > _DEPTH_MAX:
            raise FormatError(_RECORD, f"{name}: depends", 0, "modules depend on each other")
        data = read_module(found)
        for needed in dependencies(data):
            self._add(needed, ordered, (*path, name))
        ordered[name] = Module(name, data)

    @cached_property
    def builtin(self) -> frozenset[str]:
        """Names from modules.builtin; none when there is no such file."""
        try:
            lines = (self.directory / "modules.builtin").read_text().splitlines()
        except FileNotFoundError:
            return frozenset()
        return frozenset(_module_name(Path(line).name) for line in lines)

    @cached_property
    def _paths(self) -> dict[str, Path]:
        return {_module_name(path.name): path for path in self._files()}

    def _files(self) -> Iterator[Path]:
        for path in self.directory.rglob("*.ko*"):
            if _suffix(path.name) in _OPEN:
                yield path


def read_module(path: Path) -> bytes:
    """A module file's ELF bytes. Raises FormatError, LimitExceeded, OSError."""
    try:
        with _OPEN[_suffix(path.name)](path) as file:
            data = file.read(MODULE_MAX + 1)
    except (lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise FormatError(_RECORD, str(path), 0, f"cannot be decompressed: {error}") from error
    if len(data) > MODULE_MAX:
        raise LimitExceeded("module-size", len(data), MODULE_MAX, where=str(path))
    if data[:4] != b"\x7fELF":
        raise FormatError(_RECORD, str(path), 0, "is not an ELF file")
    return data


def dependencies(module: bytes) -> list[str]:
    """The names of the modules that a module says it needs."""
    at = module.find(_DEPENDS)
    if at < 0:
        return []
    start = at + len(_DEPENDS)
    value = module[start : start + _DEPENDS_MAX].partition(b"\0")[0]
    names = value.decode("ascii", "replace")
    return [_canonical(name) for name in names.split(",") if name]


def _suffix(name: str) -> str:
    _, dot, rest = name.rpartition(".ko")
    return dot + rest


def _module_name(name: str) -> str:
    return _canonical(name.rpartition(".ko")[0])


def _canonical(name: str) -> str:
    """The kernel's own spelling: the file may have dashes."""
    return name.replace("-", "_")
