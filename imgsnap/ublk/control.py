"""The life cycle of ublk devices: commands to /dev/ublk-control.

Each command has a ring of its own: they are rare, some of them wait (START_DEV for the queues,
STOP_DEV for the reads under way), and any thread may give one. See the kernel's
Documentation/block/ublk.rst.
"""

import ctypes
import errno
import os
import time
from ctypes import Structure, c_uint64, sizeof
from dataclasses import dataclass
from pathlib import Path

from imgsnap.errors import AccessDenied, AlreadyExists, ImgsnapError, NotFound, Unsupported
from imgsnap.ublk import uapi
from imgsnap.ublk.ring import Ring
from imgsnap.ublk.uapi import Control, DeviceInfo, Feature

NEEDED = Feature.USER_RECOVERY | Feature.USER_RECOVERY_REISSUE | Feature.CMD_IOCTL_ENCODE
"""What a killed server left is read by the next one; with the first flag alone it fails."""
BUSY_S = 20.0
"""How long a dead server's descriptors may take to be closed, and a node to appear."""
_FIRST_WAIT_S = 0.002
_WAIT_MAX_S = 0.05
_LOGICAL_SHIFT = 9
_PHYSICAL_SHIFT = 12
_HINT = "load it with `modprobe ublk_drv` (kernel option CONFIG_BLK_DEV_UBLK), or use --via fuse"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a device is made of besides its content."""

    queues: int  # at most one per processor: the kernel takes the rest away
    depth: int  # requests in flight, of each queue
    request_max: int  # bytes of one request, a multiple of 4096


class UblkControl:
    """The driver. Safe for threads."""

    def __init__(self, path: str = uapi.CONTROL_DEVICE) -> None:
        """Raises Unsupported without the driver or with one that is too old, AccessDenied."""
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _missing(error, path) from error
        try:
            self.features = self._features()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def _features(self) -> Feature:
        found = c_uint64()
        try:
            self._command(Control.GET_FEATURES, uapi.NEW_DEVICE_ID, found)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EPERM, errno.EACCES):
                raise AccessDenied(
                    f"io_uring, which ublk needs, is refused: {error.strerror}",
                    hint="see the sysctl kernel.io_uring_disabled and seccomp, or use --via fuse",
                ) from error
            raise Unsupported(
                f"the kernel's ublk driver is too old: {error.strerror}",
                hint="Linux 6.5 or newer is needed; or use --via fuse",
            ) from error
        features = Feature(found.value)
        if NEEDED & ~features:
            raise Unsupported(
                f"the kernel's ublk driver cannot recover (features {int(features):#x})",
                hint="use --via fuse",
            )
        return features

    # Life ------------------------------------------------------------------------------------

    def add(self, shape: Shape, mark: int, wanted: int | None = None) -> DeviceInfo:
        """A device that is not started yet; `mark` (64 bits) tells later whose it is.

        `info.dev_id` is its number, `info.nr_hw_queues` how many queues it got. Raises
        AlreadyExists when the wanted number is taken, AccessDenied, ImgsnapError.
        """
        number = uapi.NEW_DEVICE_ID if wanted is None else wanted
        flags = NEEDED | self.features & Feature.NO_AUTO_PART_SCAN
        info = DeviceInfo(
            nr_hw_queues=shape.queues,
            queue_depth=shape.depth,
            max_io_buf_bytes=shape.request_max,
            dev_id=number,
            ublksrv_pid=os.getpid(),
            flags=int(flags),
            ublksrv_flags=mark,
        )
        try:
            self._command(Control.ADD_DEV, number, info)
        except OSError as error:
            raise _refused(error, wanted) from error
        return info

    def set_size(self, number: int, size: int, request_max: int, read_ahead: int) -> None:
        """Makes a device that is not started read-only, of `size` bytes. `read_ahead` in bytes, a
        power of two, is what the kernel reads ahead for sequential readers. Raises OSError."""
        basic = uapi.BasicParams(
            attrs=uapi.ATTR_READ_ONLY,
            logical_bs_shift=_LOGICAL_SHIFT,
            physical_bs_shift=_PHYSICAL_SHIFT,
            # The kernel reads ahead twice the optimal size.
            io_opt_shift=(read_ahead // 2).bit_length() - 1,
            io_min_shift=_PHYSICAL_SHIFT,
            max_sectors=request_max // uapi.SECTOR,
            dev_sectors=size // uapi.SECTOR,
        )
        params = uapi.Params(sizeof(uapi.Params), uapi.PARAM_TYPE_BASIC, basic)
        self._command(Control.SET_PARAMS, number, params)

    def start(self, number: int) -> None:
        """Returns when the disk is there: every queue must be fetching, or will. Raises OSError."""
        self._command(Control.START_DEV, number, data=os.getpid())

    def begin_recovery(self, number: int) -> None:
        """Takes a device over from a server that is dead, once the kernel is through with that.
        Raises OSError: EINVAL for one that was never started, EBUSY for one that is served."""
        self._patiently(Control.START_USER_RECOVERY, number)

    def end_recovery(self, number: int) -> None:
        """As `start`, for a device that was started by another server. Raises OSError."""
        self._patiently(Control.END_USER_RECOVERY, number, data=os.getpid())

    def info(self, number: int) -> DeviceInfo:
        """Raises NotFound, OSError."""
        found = DeviceInfo()
        try:
            self._command(Control.GET_DEV_INFO, number, found)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise NotFound(f"there is no ublk device {number}") from error
            raise
        return found

    def stop(self, number: int, *, unless_open: bool = False) -> None:
        """Takes the disk away. Who has it open has errors from now on; with `unless_open`, on
        kernels that can tell (SAFE_STOP_DEV), that raises OSError EBUSY instead."""
        safe = unless_open and Feature.SAFE_STOP_DEV in self.features
        self._command(Control.TRY_STOP_DEV if safe else Control.STOP_DEV, number)

    def delete(self, number: int) -> None:
        """Gives the number back, when the last opener is gone. Raises OSError."""
        try:
            self._command(Control.DEL_DEV_ASYNC, number)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:  # before Linux 6.9
                raise
            self._command(Control.DEL_DEV, number)

    # Commands --------------------------------------------------------------------------------

    def _patiently(self, command: Control, number: int, data: int = 0) -> None:
        deadline, wait = time.monotonic() + BUSY_S, _FIRST_WAIT_S
        while True:
            try:
                self._command(command, number, data=data)
                return
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(wait)
            wait = min(wait * 1.5, _WAIT_MAX_S)

    def _command(
        self,
        command: Control,
        number: int,
        buffer: Structure | c_uint64 | None = None,
        data: int = 0,
    ) -> None:
        payload = uapi.ControlCommand(dev_id=number, queue_id=uapi.NO_QUEUE, data=data)
        if buffer is not None:
            payload.len = sizeof(buffer)
            payload.addr = ctypes.addressof(buffer)
        ring = Ring(1)
        try:
            result = -errno.EINTR
            while result == -errno.EINTR:
                ring.command(self._fd, command, bytes(payload), 0)
                found: list[tuple[int, int]] = []
                while not found:
                    ring.enter(1)
                    found = ring.completions()
                result = found[0][1]
        finally:
            ring.close()
        if result < 0:
            raise OSError(-result, f"ublk {command.name}: {os.strerror(-result)}")


def check_driver() -> None:
    """Raises Unsupported or AccessDenied when devices cannot be made here."""
    UblkControl().close()


def block_path(number: int) -> Path:
    """The disk of a device."""
    return Path(f"/dev/ublkb{number}")


def open_queues(number: int) -> int:
    """The descriptor of a device's queues, /dev/ublkcN, once the node is there and no dead server
    has it. Raises OSError."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            return os.open(f"/dev/ublkc{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            # EACCES: between the node and its owner, which udev gives it.
            if error.errno not in (errno.ENOENT, errno.EACCES, errno.EBUSY):
                raise
            if time.monotonic() > deadline:
                raise
        time.sleep(_WAIT_MAX_S / 5)


def _missing(error: OSError, path: str) -> ImgsnapError:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return Unsupported(f"this kernel has no ublk driver: {path} is not there", hint=_HINT)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDenied(f"{path}: {error.strerror}", hint="ublk needs root; or use --via fuse")
    return ImgsnapError(f"{path}: {error.strerror}")


def _refused(error: OSError, wanted: int | None) -> ImgsnapError:
    if error.errno == errno.EEXIST:
        return AlreadyExists(
            f"ublk device {wanted} is taken", hint="leave the number out, or choose another"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        return AccessDenied(f"adding a ublk device: {error.strerror}", hint="it needs root")
    return ImgsnapError(str(error.strerror))
