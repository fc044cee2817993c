"""One thread's capabilities (man capabilities): they are a thread's, not a process's."""

import ctypes
import os
import struct

_VERSION_3 = 0x20080522
_CAP_SYS_ADMIN = 21
_HEADER = struct.Struct("=Ii")
_DATA = struct.Struct("=6I")
"""Two struct __user_cap_data_struct: effective, permitted, inheritable; low words, then high."""

_libc = ctypes.CDLL(None, use_errno=True)


def drop_admin() -> None:
    """Takes CAP_SYS_ADMIN from the calling thread's effective set.

    A ublk queue's thread needs none, and where it has none the kernel does not look for partitions:
    it would parse bytes of a stranger, and a server killed meanwhile could not be replaced, since
    the kernel waits for those bytes with the device locked. Raises OSError.
    """
    header = ctypes.create_string_buffer(_HEADER.pack(_VERSION_3, 0))
    data = ctypes.create_string_buffer(_DATA.size)
    _check(_libc.capget(header, data))
    effective, *rest = _DATA.unpack(data.raw[: _DATA.size])
    changed = _DATA.pack(effective & ~(1 << _CAP_SYS_ADMIN), *rest)
    _check(_libc.capset(header, ctypes.create_string_buffer(changed)))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
