"""An image with this Python, this product and a store of snapshots: what guests boot from.

The files keep their absolute paths, so the interpreter finds its own. Busybox has the commands.
"""

import compileall
import fnmatch
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from tests.support.cli import REPOSITORY
from tests.support.image_builder import Image, image

SITE = "srv/site"
STORE = "/srv/store"
"""In the guest."""
PYTHON = "/bin/python"
"""Runs Python in the guest with the product on its path, and its directories in place."""
_PACKAGES = ("blake3", "click", "urllib3", "zstandard")
"""What the loader imports."""
_UNUSED = (
    "config-*", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "tkinter", "turtledemo", "dist-packages", "*.opt-?.pyc",
)  # fmt: skip
_APPLETS = (
    "sh", "cat", "chmod", "chroot", "dd", "dmesg", "echo", "find", "grep", "insmod", "kill", "ls",
    "mkdir", "mount", "ps", "rm", "rmmod", "sleep", "sync", "umount",
)  # fmt: skip


def python_image(store: Path, files: Mapping[str, bytes]) -> Image:
    """An image of one layer; `store` becomes STORE, and `files` are added by path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var"):
            _add_directory(tar, name)
        _add_bytes(tar, "bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
        for applet in _APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        _add_python(tar)
        _add_site(tar)
        tar.add(store, arcname=STORE[1:])
        for name, data in files.items():
            _add_bytes(tar, name, data)
    return image(buffer.getvalue(), compression="")


def _add_python(tar: tarfile.TarFile) -> None:
    program = Path(os.path.realpath(sys.executable))
    library = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix}))
    tar.add(program, arcname=str(program)[1:])
    tar.add(library, arcname=str(library)[1:], filter=_used)
    extensions = library.glob("lib-dynload/*.so")
    for path in _libraries([program, *extensions, *_package_files()]):
        _add_bytes(tar, str(path)[1:], path.read_bytes(), 0o755)
    script = (
        "#!/bin/sh\n"
        f"export PYTHONPATH=/{SITE} PYTHONDONTWRITEBYTECODE=1 HOME=/root\n"
        f"export IMGSNAP_STORE={STORE} IMGSNAP_RUN_DIR=/run/imgsnap IMGSNAP_CACHE_DIR=/var/cache\n"
        f'exec {program} "$@"\n'
    )
    _add_bytes(tar, PYTHON[1:], script.encode(), 0o755)


def _used(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(info.name).name
    return None if any(fnmatch.fnmatch(name, pattern) for pattern in _UNUSED) else info


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _package_files() -> Iterable[Path]:
    return [file for name in _PACKAGES for file in _package(name).rglob("*.so")]


def _add_site(tar: tarfile.TarFile) -> None:
    """The product and its packages, compiled: a guest would take seconds for that, each time."""
    import tempfile

    ours = {"imgsnap": REPOSITORY / "imgsnap", "imgsnap_cli": REPOSITORY / "cli/imgsnap_cli"}
    with tempfile.TemporaryDirectory() as name:
        for package, path in {**ours, **{name: _package(name) for name in _PACKAGES}}.items():
            shutil.copytree(path, Path(name, package))
        compileall.compile_dir(name, quiet=1, ddir=f"/{SITE}")
        tar.add(name, arcname=SITE, filter=_used)


def _libraries(programs: Iterable[Path]) -> set[Path]:
    """Shared libraries and the loader that the programs need, where they look for them."""
    said = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False, timeout=60
    ).stdout
    words = {word for line in said.splitlines() for word in line.split() if word.startswith("/")}
    return {Path(word) for word in words if not word.endswith(":")}


def _add_directory(tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(info)


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), mode
    tar.addfile(info, io.BytesIO(data))
