"""io_uring through ctypes: submission entries of 128 bytes, for URING_CMD.

One thread owns a ring: it makes it, fills it, and takes its completions, which the kernel puts
there only while that thread is in `enter` (DEFER_TASKRUN). So no memory barrier is needed that the
system call is not.
"""

import ctypes
import mmap
import os
import select

from imgsnap.ublk import uapi

_libc = ctypes.CDLL(None, use_errno=True)
_EINTR = 4


class Ring:
    """Close it in the thread that made it."""

    def __init__(self, entries: int, completions: int = 0) -> None:
        """`entries` submissions before they must be entered; `completions` is the size of their
        queue, at least twice that. Raises OSError: ENOSYS and EPERM for a kernel without io_uring
        or where it is switched off, EINVAL before Linux 6.1."""
        flags = uapi.Setup.SQE128 | uapi.Setup.SINGLE_ISSUER | uapi.Setup.DEFER_TASKRUN
        flags |= uapi.Setup.CLAMP | (uapi.Setup.CQSIZE if completions else 0)
        params = uapi.RingParams(flags=flags, cq_entries=completions)
        self.fd = _call(uapi.SYS_IO_URING_SETUP, entries, ctypes.byref(params))
        try:
            self._map(params)
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self, params: uapi.RingParams) -> None:
        sq, cq = params.sq_off, params.cq_off
        self._entries: int = params.sq_entries
        size = max(sq.array + params.sq_entries * 4, cq.cqes + params.cq_entries * uapi.CQE_SIZE)
        self._rings = mmap.mmap(self.fd, size, offset=uapi.OFF_SQ_RING)
        self._sqes = mmap.mmap(self.fd, params.sq_entries * uapi.SQE_SIZE, offset=uapi.OFF_SQES)
        self._words = memoryview(self._rings).cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq.tail // 4, cq.head // 4, cq.tail // 4
        self._sq_mask: int = self._words[sq.ring_mask // 4]
        self._cq_mask = self._words[cq.ring_mask // 4]
        self._cqes: int = cq.cqes
        self._pending = 0
        for number in range(params.sq_entries):
            self._words[sq.array // 4 + number] = number

    def close(self) -> None:
        self._words.release()
        self._rings.close()
        self._sqes.close()
        os.close(self.fd)

    # Submissions -----------------------------------------------------------------------------

    def _slot(self) -> int:
        """Where the next entry goes, in bytes; the caller fills all that is read of it."""
        if self._pending == self._entries:
            self.enter(0)
        tail: int = self._words[self._sq_tail]
        self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        self._pending += 1
        return (tail & self._sq_mask) * uapi.SQE_SIZE

    def command(self, fd: int, operation: int, payload: bytes, user_data: int) -> None:
        """Queues a URING_CMD for a device; the payload is at most 80 bytes."""
        at = self._slot()
        uapi.SQE_COMMAND.pack_into(
            self._sqes, at, uapi.OP_URING_CMD, 0, 0, fd, operation, 0, 0, 0, 0, user_data
        )
        at += uapi.SQE_COMMAND.size
        self._sqes[at : at + len(payload)] = payload

    def poll(self, fd: int, user_data: int) -> None:
        """Queues one notice of a descriptor's being readable."""
        at = self._slot()
        uapi.SQE_POLL.pack_into(
            self._sqes, at, uapi.OP_POLL_ADD, 0, 0, fd, 0, 0, 0, select.POLLIN, user_data
        )

    def enter(self, wait: int) -> None:
        """Submits what is queued and waits for that many completions. Raises OSError."""
        flags = uapi.ENTER_GETEVENTS if wait else 0
        pending = self._pending
        while pending or wait:
            done = _call(uapi.SYS_IO_URING_ENTER, self.fd, pending, wait, flags, None, 0)
            pending -= done
            if not pending:
                break
        self._pending = pending

    def completions(self) -> list[tuple[int, int]]:
        """What has completed since the last time: user data and result of each."""
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        found = []
        while head != tail:
            at = self._cqes + (head & self._cq_mask) * uapi.CQE_SIZE
            found.append(uapi.CQE.unpack_from(self._rings, at))
            head = (head + 1) & 0xFFFFFFFF
        words[self._cq_head] = head
        return found


def _call(number: int, *arguments: object) -> int:
    """syscall(2), again when a signal interrupts it. Raises OSError."""
    while True:
        result: int = _libc.syscall(number, *arguments)
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != _EINTR:
            raise OSError(error, os.strerror(error))
