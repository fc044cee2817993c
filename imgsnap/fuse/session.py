"""The agreement that the kernel and a server make once per superblock.

It is made before the first server starts and kept by whoever holds the device: INIT is not
repeated when another server takes over.
"""

import errno
import os
from typing import NamedTuple

from imgsnap.errors import Unsupported
from imgsnap.fuse import protocol
from imgsnap.fuse.protocol import IN_HEADER_SIZE, InitFlag, InitRequest, Opcode

MAX_BACKGROUND = 64
"""Requests without a waiting process (kernel readahead) in flight: 64 MiB at 1 MiB each."""


class FuseSession(NamedTuple):
    """What INIT agreed on: the protocol's minor version and the flags."""

    minor: int
    flags: int

    @property
    def resends(self) -> bool:
        """Whether the kernel sends lost requests again (6.9+): without it a server's death hangs
        its readers."""
        return bool(self.flags & InitFlag.HAS_RESEND)


def negotiate(fd: int) -> FuseSession:
    """Answers the INIT of a superblock that was just mounted. Raises Unsupported, OSError."""
    request = bytearray(protocol.REQUEST_SIZE_MAX)
    view = memoryview(request)
    while True:
        count = os.readv(fd, (request,))
        _, opcode, unique, _ = protocol.IN_HEADER.unpack_from(view)
        if opcode != Opcode.INIT:
            os.write(fd, protocol.error_reply(unique, errno.EIO))
            continue
        asked = InitRequest.parse(view[IN_HEADER_SIZE:count])
        if asked.major > protocol.KERNEL_VERSION:
            # The kernel then sends INIT again with the version we state.
            os.write(fd, protocol.reply(unique, _init_out(protocol.MINOR_MAX, 0, 0)))
            continue
        if asked.major < protocol.KERNEL_VERSION or asked.minor < protocol.MINOR_MIN:
            os.write(fd, protocol.error_reply(unique, errno.EPROTO))
            raise Unsupported(
                f"the kernel speaks FUSE {asked.major}.{asked.minor}",
                hint=f"7.{protocol.MINOR_MIN} (Linux 5.4) is the oldest that will do",
            )
        flags = int(asked.flags & protocol.WANTED_FLAGS)
        minor = min(asked.minor, protocol.MINOR_MAX)
        os.write(fd, protocol.reply(unique, _init_out(minor, asked.max_readahead, flags)))
        return FuseSession(minor, flags)


def _init_out(minor: int, readahead: int, flags: int) -> bytes:
    return protocol.INIT_OUT.pack(
        protocol.KERNEL_VERSION,
        minor,
        readahead,  # the kernel's own limit; the real one is set on the bdi after the mount
        flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        protocol.MAX_WRITE,
        1,
        protocol.MAX_PAGES,
        0,
        flags >> 32,
        0,
    )
