"""A read-only FUSE server on the raw /dev/fuse device.

Worker threads read requests and answer those that need no waiting. A read whose chunks are not
here is handed to the content with a completion that writes the reply later, so that a slow
registry never occupies a worker. Failures are EIO to the reader and a line in the log: a wrong
or a zero byte is worse than an error.

INTERRUPT is not answered and does not cancel: the read belongs to the page cache, and an EINTR
there turns into SIGBUS or EIO for a process that merely got a timer signal.
"""

import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Callable

from imgsnap.blockstore.content import FileContent
from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.fuse import protocol
from imgsnap.fuse.files import Catalog, FileTree
from imgsnap.fuse.protocol import IN_HEADER_SIZE, OUT_HEADER_SIZE, Opcode, OpenFlag
from imgsnap.fuse.session import FuseSession

DEFAULT_THREADS = 2
_EMPTY_REPLY = (Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.ACCESS, Opcode.DESTROY)
_TRANSIENT = (errno.EINTR, errno.ENOENT, errno.EAGAIN)
_GONE = (errno.ENODEV, errno.EBADF)
_READ_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


class FuseServer:
    """Serves one superblock until it is unmounted.

    Does not close `fd`: completions write to it from other threads, so it must stay open until
    the contents can complete no more reads (their fetcher is closed).
    """

    def __init__(
        self,
        fd: int,
        catalog: Catalog,
        session: FuseSession,
        *,
        threads: int = DEFAULT_THREADS,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """`session` is what `negotiate` agreed on, by this process or by one that is gone;
        `on_end` is called once, from a worker, when the superblock is gone."""
        self._files = FileTree(catalog)
        self._session = session
        self._fd = fd
        self._on_end = on_end
        self._gone = False
        self._failures = RateLimit(_log)
        self._lock = threading.Lock()
        self._running = threads
        self._threads = [
            threading.Thread(target=self._run, name=f"fuse-{number}", daemon=True)
            for number in range(threads)
        ]

    def start(self) -> None:
        """Starts the workers, and asks for the requests that a former server left unanswered."""
        if self._session.resends:
            os.write(self._fd, protocol.resend_notification())
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float) -> bool:
        """Waits until the workers have ended, which they do after an unmount."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # Requests --------------------------------------------------------------------------------

    def _run(self) -> None:
        worker = _Worker(self._fd, self._failures)
        request = bytearray(protocol.REQUEST_SIZE_MAX)
        view = memoryview(request)
        try:
            while True:
                try:
                    count = os.readv(self._fd, (request,))
                except OSError as error:
                    if error.errno in _TRANSIENT:
                        continue
                    if error.errno in _GONE:
                        self._gone = True
                        return
                    # Short of memory, perhaps: only the kernel's ENODEV means that it is over.
                    self._failures.log(logging.ERROR, "reading the FUSE device failed: %s", error)
                    time.sleep(_READ_AGAIN_S)
                    continue
                if not count:
                    self._gone = True
                    return  # a socket in the device's place was closed
                try:
                    self._answer(worker, view[:count])
                except OSError as error:  # the kernel refused a reply: its reader has an error
                    self._failures.log(logging.ERROR, "a reply was lost: %s", error)
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last and self._gone and self._on_end is not None:
                self._on_end()

    def _answer(self, worker: "_Worker", request: memoryview) -> None:
        """Handles one request. Whatever goes wrong, the kernel gets an answer."""
        if len(request) < IN_HEADER_SIZE:
            self._failures.log(logging.ERROR, "a request of only %d bytes", len(request))
            return
        length, opcode, unique, node = protocol.IN_HEADER.unpack_from(request)
        try:
            if length != len(request):
                worker.fail(unique, errno.EIO, f"request of {len(request)} bytes says {length}")
            elif opcode == Opcode.READ:
                self._read(worker, unique, node, request[IN_HEADER_SIZE:])
            elif opcode in (Opcode.FORGET, Opcode.BATCH_FORGET):
                for gone in protocol.forgotten_nodes(opcode, node, request[IN_HEADER_SIZE:]):
                    self._files.forget(gone)
            elif opcode != Opcode.INTERRUPT:
                worker.send(self._other(opcode, unique, node, request[IN_HEADER_SIZE:]))
        except struct.error:
            worker.fail(unique, errno.EIO, f"request {opcode} is too short")
        except Exception as error:
            worker.fail(unique, errno.EIO, f"{type(error).__name__}: {error}")

    def _read(self, worker: "_Worker", unique: int, node: int, body: memoryview) -> None:
        content = self._files.file(node)
        if content is None:
            worker.send(protocol.error_reply(unique, errno.ENOENT))
            return
        offset, size = protocol.READ_IN.unpack_from(body)
        size = min(size, max(0, content.size - offset), protocol.READ_SIZE_MAX)
        if not size:
            worker.send(protocol.error_reply(unique, 0))
        elif content.read_into(view := worker.buffer(size), offset):
            worker.send_data(unique, view)
        else:
            self._read_later(worker, content, unique, offset, size)

    def _read_later(
        self, worker: "_Worker", content: FileContent, unique: int, offset: int, size: int
    ) -> None:
        def done(data: memoryview | None, error: BaseException | None) -> None:
            if data is not None and len(data) == size:
                worker.send_data(unique, data)
            else:
                worker.fail(unique, errno.EIO, f"read of {size} bytes at {offset}: {error}")

        content.fetch(offset, size, done)

    def _other(self, opcode: int, unique: int, node: int, body: memoryview) -> bytes:
        """The reply to a request that is neither READ nor without reply."""
        if opcode == Opcode.LOOKUP:
            return self._lookup(unique, node, bytes(body).rstrip(b"\0"))
        if opcode == Opcode.GETATTR:
            attr = self._attr(node)
            if attr is None:
                return protocol.error_reply(unique, errno.ENOENT)
            return protocol.reply(unique, protocol.ATTR_OUT.pack(protocol.VALID_S, 0, 0) + attr)
        if opcode == Opcode.OPEN:
            content = self._files.file(node)
            flags = OpenFlag.DIRECT_IO if content and content.exact else OpenFlag.KEEP_CACHE
            return protocol.reply(unique, protocol.OPEN_OUT.pack(0, flags, 0))
        if opcode == Opcode.OPENDIR:
            return protocol.reply(unique, protocol.OPEN_OUT.pack(0, 0, 0))
        if opcode == Opcode.READDIR:
            offset, size = protocol.READ_IN.unpack_from(body)
            return protocol.reply(unique, self._files.listing(node, offset, size))
        if opcode == Opcode.STATFS:
            return protocol.reply(unique, self._statfs())
        if opcode in _EMPTY_REPLY:
            return protocol.error_reply(unique, 0)
        # FLUSH among others: after one ENOSYS the kernel sends no more. A process that closes a
        # file, for instance in exec, must not have to wait for us.
        return protocol.error_reply(unique, errno.ENOSYS)

    def _lookup(self, unique: int, parent: int, name: bytes) -> bytes:
        found = self._files.lookup(parent, name)
        if found is None:
            return protocol.error_reply(unique, errno.ENOENT)
        valid = protocol.VALID_S
        entry = protocol.ENTRY_OUT.pack(found.node, 0, valid, valid, 0, 0)
        if found.content is None:
            return protocol.reply(unique, entry + protocol.directory_attr(found.node))
        return protocol.reply(unique, entry + protocol.file_attr(found.node, found.content.size))

    def _attr(self, node: int) -> bytes | None:
        content = self._files.file(node)
        if content is not None:
            return protocol.file_attr(node, content.size)
        return protocol.directory_attr(node) if self._files.is_directory(node) else None

    def _statfs(self) -> bytes:
        page = protocol.PAGE_SIZE
        return protocol.STATFS_OUT.pack(0, 0, 0, 0, 0, page, protocol.NAME_MAX, page)


class _Worker:
    """Replies, and one worker's data buffer. Sending is safe from any thread."""

    def __init__(self, fd: int, failures: RateLimit) -> None:
        self._fd = fd
        self._failures = failures
        self._buffer = memoryview(bytearray(protocol.READ_SIZE_MAX))

    def buffer(self, size: int) -> memoryview:
        return self._buffer[:size]

    def send_data(self, unique: int, data: memoryview) -> None:
        header = protocol.OUT_HEADER.pack(OUT_HEADER_SIZE + len(data), 0, unique)
        self._write((header, data))

    def send(self, reply: bytes) -> None:
        self._write((reply,))

    def fail(self, unique: int, code: int, reason: str) -> None:
        self._failures.log(logging.ERROR, "%s", reason)
        if unique:
            self._write((protocol.error_reply(unique, code),))

    def _write(self, parts: tuple[bytes | memoryview, ...]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            # ENOENT: the request was aborted. ENODEV, EBADF: the superblock is gone.
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EBADF):
                self._failures.log(logging.ERROR, "the kernel refused a reply: %s", error)
                raise
