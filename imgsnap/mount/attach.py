"""From a served file to a file system: the FUSE superblock and EROFS over its file."""

import contextlib
import errno
import logging
import os
import time
from pathlib import Path
from typing import NamedTuple

from imgsnap.errors import AccessDenied, Busy, Unsupported
from imgsnap.fuse.protocol import READ_SIZE_MAX
from imgsnap.mount import linux
from imgsnap.mount.linux import MountFlag, UmountFlag

FUSE_TYPE = "fuse.imgsnap"
READ_AHEAD_LAZY_KB = 128
READ_AHEAD_LOCAL_KB = 1024
"""The kernel's readahead on the device file, fixed when EROFS opens it. While chunks have to be
fetched its guesses cost network: with 1 MiB a cold Python start fetched 12 % more in no less time.
When all bytes are local it saves requests: sequential reads are 1.4 times as fast as with 128."""
READ_AHEAD_EXACT_KB = 4
"""On files that VMMs open to start from a boot pack, a page: guests read ahead themselves, and what
the host's kernel adds differs from boot to boot, so that no pack has all of it. What a VMM asks for
is still read with one request (mm/readahead.c bounds that by io_pages); with 0 it would be page by
page. It counts for files that are opened from then on."""
BUSY_RETRIES = 120
BUSY_WAIT_S = 0.05
"""The kernel closes the file below an unmounted EROFS a moment after umount returns, and a
container that is just being made holds a copy of all mounts for as long."""

BDI_ATTEMPTS = 8
_BDI = Path("/sys/class/bdi")
_FILE_BACKED_REFUSED = errno.ENOTBLK
"""What a kernel without file-backed mounts says: it wants a block device."""
_log = logging.getLogger(__name__)


class ErofsMount(NamedTuple):
    """How EROFS got its bytes: from the file itself, or through a loop device."""

    loop: str = ""  # the loop device, when the kernel refused the file
    bdi: str = ""  # name in /sys/class/bdi; "" when it could not be told from others


def mount_fuse(directory: Path) -> int:
    """Mounts an empty FUSE superblock; the descriptor through which it is served.

    Raises Unsupported without /dev/fuse, AccessDenied without privileges.
    """
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Unsupported("there is no /dev/fuse", hint="modprobe fuse") from error
    except PermissionError as error:
        raise AccessDenied("/dev/fuse: permission denied", hint="run as root") from error
    options = (
        f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
        f"max_read={READ_SIZE_MAX}"
    )
    flags = MountFlag.RDONLY | MountFlag.NOSUID | MountFlag.NODEV | MountFlag.NOEXEC
    try:
        linux.mount("imgsnap", directory, FUSE_TYPE, flags, options)
    except OSError as error:
        os.close(fd)
        raise linux.mount_error(error) from error
    return fd


def tune_readahead(path: Path, kib: int) -> None:
    """Sets the readahead of the file system that `path` is on; a failure only costs speed."""
    device = path.stat().st_dev
    set_readahead(f"{os.major(device)}:{os.minor(device)}", kib)


def set_readahead(bdi: str, kib: int) -> None:
    """As `tune_readahead`, by the name of the bdi. Counts for files that are opened from now on."""
    path = _BDI / bdi / "read_ahead_kb"
    try:
        path.write_text(str(kib))
    except OSError as error:
        _log.warning("cannot set the readahead in %s: %s", path, error)


def mount_erofs_devices(image: Path, target: Path, options: str) -> ErofsMount:
    """Mounts an EROFS image file whose data is in other files, which `options` name.

    Raises our error for the kernel's refusal; one that takes no files refuses this.
    """
    try:
        linux.mount(str(image), target, "erofs", MountFlag.RDONLY | MountFlag.NODEV, options)
    except OSError as error:
        raise linux.mount_error(error) from error
    return ErofsMount()


def mount_erofs(image: Path, target: Path, *, find_bdi: bool = False) -> ErofsMount:
    """Mounts an EROFS image file, directly where the kernel can (6.12 and newer).

    Raises our error for the kernel's refusal.
    """
    flags = MountFlag.RDONLY | MountFlag.NODEV
    try:
        if find_bdi:
            return ErofsMount(bdi=_mount_telling_bdi(image, target, flags))
        linux.mount(str(image), target, "erofs", flags)
        return ErofsMount()
    except OSError as error:
        if error.errno != _FILE_BACKED_REFUSED:
            raise linux.mount_error(error) from error
        refusal = error
    _log.warning("the kernel refuses EROFS over a file (%s); using a loop device", refusal)
    try:
        device, path = linux.attach_loop(image)
    except OSError as error:
        raise Unsupported(
            f"{refusal.strerror}; and no loop device: {error.strerror or error}",
            hint="EROFS over a file needs Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE",
        ) from error
    number = path.stat().st_rdev
    try:
        linux.mount(str(path), target, "erofs", flags)
    except OSError as error:
        raise linux.mount_error(error) from error
    finally:
        os.close(device)
    return ErofsMount(str(path), f"{os.major(number)}:{os.minor(number)}")


def _mount_telling_bdi(image: Path, target: Path, flags: MountFlag) -> str:
    """Mounts, and tells the name of the new superblock's bdi; "" if others kept mounting too.

    EROFS over a file calls its bdi erofs-<number>, by a counter of the kernel that nothing shows:
    when exactly one name appears during our mount, it is ours.
    """
    for attempt in range(BDI_ATTEMPTS):
        before = _erofs_bdis()
        linux.mount(str(image), target, "erofs", flags)
        new = _erofs_bdis() - before
        if len(new) == 1:
            return new.pop()
        if attempt < BDI_ATTEMPTS - 1:
            linux.umount(target, UmountFlag.NOFOLLOW)
            time.sleep(BUSY_WAIT_S * os.urandom(1)[0] / 255)  # not in step with the others
    return ""


def _erofs_bdis() -> set[str]:
    return {path.name for path in _BDI.glob("erofs-*")}


def unmount(target: Path, *, lazy: bool = False, retry: bool = False) -> None:
    """Unmounts what is at `target`; nothing mounted there is fine.

    `retry` waits some seconds for others to let go of it. Raises Busy while it is in use.
    """
    flags = UmountFlag.NOFOLLOW | (UmountFlag.DETACH if lazy else UmountFlag(0))
    for attempt in range(BUSY_RETRIES):
        try:
            linux.umount(target, flags)
            return
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno != errno.EBUSY:
                raise linux.mount_error(error) from error
            if not retry or attempt == BUSY_RETRIES - 1:
                raise Busy(
                    f"{target} is in use",
                    hint="end the processes that use it (fuser -vm shows them), or unmount lazily",
                ) from error
        time.sleep(BUSY_WAIT_S)


def remove_directory(directory: Path) -> None:
    """Removes an empty directory that may be gone or in use as a mount point."""
    with contextlib.suppress(OSError):
        directory.rmdir()
