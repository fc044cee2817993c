"""Threads that serve the queues of ublk devices.

A queue belongs to one thread, which alone may give its commands to the kernel. It answers what
needs no waiting; what must be fetched is completed by any other thread, which leaves the result and
wakes it. So a slow fetch holds up nobody else's request.
"""

import errno
import logging
import mmap
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from ctypes import addressof, c_char
from typing import NamedTuple

from imgsnap.blockstore.content import FileContent
from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.ublk import uapi
from imgsnap.ublk.capabilities import drop_admin
from imgsnap.ublk.control import Shape
from imgsnap.ublk.ring import Ring

SUBMISSIONS = 128
COMPLETIONS = 4096
_TAG_BITS = 16
_WAKE = (1 << 64) - 1
"""User data of the eventfd; a request's is the queue's key and its tag."""
_TRANSIENT = (errno.EAGAIN, errno.EBUSY, errno.ENOMEM)
_AGAIN_S = 0.01
_log = logging.getLogger(__name__)


class Commit(NamedTuple):
    """A request that was fetched: what its queue is to tell the kernel."""

    queue: "Queue"
    tag: int
    result: int  # bytes, or a negative errno


class Queue:
    """One queue of a device: its requests, and a buffer for each of them."""

    def __init__(
        self, fd: int, number: int, shape: Shape, content: FileContent, ended: Callable[[], None]
    ) -> None:
        """`fd` is the device's /dev/ublkcN, and stays open until `ended` was called: the kernel has
        no request for this queue any more, and sends none. Raises OSError."""
        self.fd = fd
        self.number = number
        self.key = -1  # given by its loop
        self.content = content
        self._ended = ended
        self._depth = self._fetching = shape.depth
        self._size = shape.request_max
        self._described = mmap.mmap(
            fd,
            uapi.descriptions_size(shape.depth),
            prot=mmap.PROT_READ,
            offset=uapi.descriptions_offset(number),
        )
        # Private: of shared memory MADV_DONTNEED frees nothing.
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._pool = mmap.mmap(-1, shape.depth * shape.request_max, flags=kind)
        self._answering = 0
        self._used = False
        self._address = addressof(c_char.from_buffer(self._pool))
        whole = memoryview(self._pool)
        self._views = [
            whole[tag * self._size : (tag + 1) * self._size] for tag in range(self._depth)
        ]

    def fetch_all(self, ring: Ring) -> None:
        """Asks the kernel for its first requests."""
        for tag in range(self._depth):
            self.submit(ring, uapi.IO_FETCH, tag, -1)

    def commit(self, ring: Ring, tag: int, result: int) -> None:
        """Gives the kernel a request's result, and asks for the tag's next one."""
        self._answering -= 1
        self.submit(ring, uapi.IO_COMMIT_AND_FETCH, tag, result)

    def trim(self) -> None:
        """Gives the buffers' memory back if none has been used since the last time. Only when the
        kernel has taken every result that was submitted."""
        if not self._used and not self._answering:
            self._pool.madvise(mmap.MADV_DONTNEED)
        self._used = False

    def submit(self, ring: Ring, operation: int, tag: int, result: int) -> None:
        address = self._address + tag * self._size
        payload = uapi.IO_COMMAND.pack(self.number, tag, result, address)
        ring.command(self.fd, operation, payload, self.key << _TAG_BITS | tag)

    def request(self, tag: int, later: Callable[[Commit], None]) -> int | None:
        """Answers the tag's request: the result, or None when `later` gets it."""
        self._answering += 1
        self._used = True
        flags, sectors, start, _ = uapi.IO_DESCRIPTION.unpack_from(
            self._described, tag * uapi.IO_DESCRIPTION.size
        )
        if flags & uapi.OP_MASK != uapi.OP_READ:
            return 0 if flags & uapi.OP_MASK == uapi.OP_FLUSH else -errno.EROFS
        length: int = sectors * uapi.SECTOR
        offset: int = start * uapi.SECTOR
        if length > self._size:
            return -errno.EIO
        view = self._views[tag][:length]
        if self.content.read_into(view, offset):
            return length

        def done(data: memoryview | None, error: BaseException | None) -> None:
            if data is not None and len(data) == length:
                view[:] = data
                later(Commit(self, tag, length))
            else:
                _failures.log(logging.ERROR, "read of %d bytes at %d: %s", length, offset, error)
                later(Commit(self, tag, -errno.EIO))

        self.content.fetch(offset, length, done)
        return None

    def tag_ended(self) -> bool:
        """A tag is fetched no more; True when it was the last one."""
        self._fetching -= 1
        if self._fetching:
            return False
        self._described.close()
        self._ended()
        return True


class Loop:
    """A thread with a ring, and the queues it serves."""

    def __init__(self, name: str) -> None:
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._mail: deque[Queue | Commit] = deque()
        self._queues: dict[int, Queue] = {}
        self._last_key = 0
        self._trim = self._abandoned = False
        self._started = threading.Event()
        self._failure: OSError | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()
        self._started.wait()
        if self._failure is not None:
            os.close(self._wake)
            raise self._failure

    def serve(self, queue: Queue) -> None:
        """Takes a queue, until the kernel ends it."""
        self._post(queue)

    def trim(self) -> None:
        """Gives memory back that idle queues have: call it every few seconds."""
        self._trim = True
        os.eventfd_write(self._wake, 1)

    def abandon(self) -> None:
        """From now on no request fails: what cannot be read is left to the next server."""
        self._abandoned = True

    def _post(self, item: Queue | Commit) -> None:
        if self._abandoned and isinstance(item, Commit) and item.result < 0:
            return
        self._mail.append(item)
        os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        try:
            drop_admin()
            ring = Ring(SUBMISSIONS, COMPLETIONS)
        except OSError as error:
            self._failure = error
            return
        finally:
            self._started.set()
        try:
            ring.poll(self._wake, _WAKE)
            while True:
                self._enter(ring)
                for user_data, result in ring.completions():
                    if user_data == _WAKE:
                        self._open_mail(ring)
                    else:
                        self._completed(ring, user_data, result)
        except BaseException:
            # Readers would wait for ever for a thread that is gone: the next server serves them.
            _log.exception("a ublk thread failed; ending the process")
            logging.shutdown()
            os.kill(os.getpid(), signal.SIGKILL)

    def _enter(self, ring: Ring) -> None:
        try:
            ring.enter(1)
        except OSError as error:
            if error.errno not in _TRANSIENT:
                raise
            _failures.log(logging.ERROR, "io_uring: %s", error)
            time.sleep(_AGAIN_S)
            return
        if self._trim:  # here, because everything submitted has been taken
            self._trim = False
            for queue in self._queues.values():
                queue.trim()

    def _open_mail(self, ring: Ring) -> None:
        os.eventfd_read(self._wake)
        while self._mail:
            item = self._mail.popleft()
            if isinstance(item, Commit):
                item.queue.commit(ring, item.tag, item.result)
            else:
                self._last_key += 1
                item.key = self._last_key
                self._queues[item.key] = item
                item.fetch_all(ring)
        ring.poll(self._wake, _WAKE)

    def _completed(self, ring: Ring, user_data: int, result: int) -> None:
        """A request has come, or none will come any more."""
        queue = self._queues[user_data >> _TAG_BITS]
        tag = user_data & ((1 << _TAG_BITS) - 1)
        if result < 0:
            if result != uapi.ABORTED:
                _log.error("a ublk queue's tag %d: %s", tag, os.strerror(-result))
            if queue.tag_ended():
                del self._queues[queue.key]
            return
        try:
            answer = queue.request(tag, self._post)
        except Exception as error:
            _failures.log(logging.ERROR, "%s: %s", type(error).__name__, error)
            answer = -errno.EIO
        if answer is not None:
            queue.commit(ring, tag, answer)


_failures = RateLimit(_log)
