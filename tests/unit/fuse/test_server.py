"""The FUSE server, spoken to by a test in the kernel's place over a seqpacket socket."""

import errno
import logging
import socket
import struct
import threading

import pytest

from imgsnap.blockstore.log_limit import RateLimit
from imgsnap.errors import Unsupported
from imgsnap.fuse import protocol
from imgsnap.fuse.protocol import InitFlag, Opcode
from imgsnap.fuse.server import FuseServer
from imgsnap.fuse.session import FuseSession, negotiate
from tests.support.catalog import StaticCatalog

DATA = bytes(range(256)) * 64
SESSION = FuseSession(45, 0)
DIRECTORY, FILE = 2, 3
"""The nodes of the first device."""


class Content:
    """A file whose second half is never here at once."""

    size = len(DATA)

    def __init__(self):
        self.waiting = []
        self.broken = None

    def read_into(self, view, offset):
        if self.broken:
            raise self.broken
        if offset + len(view) > self.size // 2:
            return False
        view[:] = DATA[offset : offset + len(view)]
        return True

    def fetch(self, offset, length, done):
        self.waiting.append((offset, length, done))


class Kernel:
    def __init__(self, session=SESSION):
        self.content = Content()
        self.ended = threading.Event()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(5)
        self._theirs = theirs
        self.catalog = StaticCatalog({"one": self.content})
        self.server = FuseServer(theirs.fileno(), self.catalog, session, on_end=self.ended.set)
        self.server.start()

    def send(self, opcode, unique, node=1, body=b"", length=None):
        total = protocol.IN_HEADER_SIZE + len(body)
        header = protocol.IN_HEADER.pack(length or total, opcode, unique, node)
        self.ours.send(header + body)

    def receive(self):
        raw = self.ours.recv(1 << 21)
        length, error, unique = protocol.OUT_HEADER.unpack_from(raw)
        assert length == len(raw)
        return -error, unique, raw[16:]

    def ask(self, opcode, unique=7, node=1, body=b"", length=None):
        self.send(opcode, unique, node, body, length)
        error, answered, data = self.receive()
        assert answered == unique
        return error, data

    def read(self, offset, size, unique=9):
        return self.ask(Opcode.READ, unique, FILE, read_body(offset, size))


def read_body(offset, size):
    return struct.pack("=QQIIQII", 0, offset, size, 0, 0, 0, 0)


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.ours.close()
    assert made.server.join(5)
    assert made.ended.is_set()


def init_body(minor=45, flags=0xFFFFFFFF, major=7):
    return struct.pack("=IIIII44x", major, minor, 131072, flags, 0xFFFFFFFF)


def agree(*bodies):
    """What `negotiate` makes of these INITs, and its replies."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for unique, body in enumerate(bodies, 1):
            size = protocol.IN_HEADER_SIZE + len(body)
            ours.send(protocol.IN_HEADER.pack(size, Opcode.INIT, unique, 0) + body)
        try:
            session = negotiate(theirs.fileno())
        except Unsupported as error:
            session = error
        replies = [ours.recv(4096) for _ in bodies]
    return session, replies


def test_init_agrees_on_what_both_know():
    session, (reply,) = agree(init_body())
    out = protocol.INIT_OUT.unpack(reply[16:])
    assert out[:2] == (7, 45)
    assert out[8] == 256  # max_pages
    flags = out[3] | out[10] << 32
    assert flags == protocol.WANTED_FLAGS
    assert not flags & (1 << 37), "passthrough would forbid a file-backed mount"
    assert session == FuseSession(45, flags)
    assert session.resends


def test_init_with_an_older_or_newer_kernel():
    session, (reply,) = agree(init_body(minor=31, flags=1 | 1 << 22))
    assert protocol.INIT_OUT.unpack(reply[16:])[1::2][:2] == (31, 1 | 1 << 22)
    assert session == FuseSession(31, 1 | 1 << 22)
    assert not session.resends
    session, (reply,) = agree(init_body(minor=30))
    assert isinstance(session, Unsupported)
    assert protocol.OUT_HEADER.unpack(reply)[1] == -errno.EPROTO
    session, replies = agree(init_body(major=8), init_body())
    assert protocol.INIT_OUT.unpack(replies[0][16:])[0] == 7
    assert session.minor == 45


def test_names_attributes_and_listings(kernel):
    error, data = kernel.ask(Opcode.LOOKUP, body=b"one\0")
    assert error == 0
    assert protocol.ENTRY_OUT.unpack_from(data)[0] == DIRECTORY
    error, data = kernel.ask(Opcode.LOOKUP, node=DIRECTORY, body=b"layer.erofs\0")
    assert protocol.ENTRY_OUT.unpack_from(data)[0] == FILE
    attr = protocol.ATTR.unpack_from(data, protocol.ENTRY_OUT.size)
    assert attr[:2] == (FILE, len(DATA))
    for node, name in ((1, b"other"), (FILE, b"layer.erofs"), (4, b"layer.erofs"), (1, b"x" * 256)):
        assert kernel.ask(Opcode.LOOKUP, node=node, body=name + b"\0")[0] == errno.ENOENT
    for node in (4, 5, 99):
        assert kernel.ask(Opcode.GETATTR, node=node, body=bytes(16))[0] == errno.ENOENT
    for node in (1, DIRECTORY, FILE):
        assert kernel.ask(Opcode.GETATTR, node=node, body=bytes(16))[0] == 0
    for node, name in ((1, b"one"), (DIRECTORY, b"layer.erofs")):
        _, data = kernel.ask(Opcode.READDIR, node=node, body=read_body(0, 4096))
        assert name in data
        _, rest = kernel.ask(Opcode.READDIR, node=node, body=read_body(2, 4096))
        assert data.endswith(rest) and name in rest
        assert kernel.ask(Opcode.READDIR, node=node, body=read_body(3, 4096)) == (0, b"")
    for opcode in (Opcode.OPEN, Opcode.OPENDIR, Opcode.STATFS, Opcode.RELEASE, Opcode.DESTROY):
        assert kernel.ask(opcode, body=bytes(48))[0] == 0


def test_what_the_kernel_forgets_is_passed_on(kernel):
    kernel.send(Opcode.FORGET, 0, FILE, bytes(8))
    kernel.send(Opcode.FORGET, 0, DIRECTORY, bytes(8))
    batch = struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 1, 1, 7, 1)
    kernel.send(Opcode.BATCH_FORGET, 0, 0, batch)
    kernel.send(Opcode.BATCH_FORGET, 0, 0, batch[:-4])
    assert kernel.read(0, 3) == (0, DATA[:3])
    while len(kernel.catalog.gone) < 2:
        threading.Event().wait(0.005)
    assert sorted(kernel.catalog.gone) == [1, 3], "directories and the root hold nothing"


def test_reads_here_are_answered_at_once_and_others_when_they_arrive(kernel):
    assert kernel.read(10, 100) == (0, DATA[10:110])
    half = len(DATA) // 2
    kernel.send(Opcode.READ, 21, FILE, read_body(half, 4096))
    # Two workers, and more waiting reads than workers: hits are still answered.
    for unique in range(22, 30):
        kernel.send(Opcode.READ, unique, FILE, read_body(half, 100))
    assert kernel.read(0, 5, unique=99) == (0, DATA[:5])
    while len(kernel.content.waiting) < 9:
        threading.Event().wait(0.005)
    answered = {}
    for offset, length, done in reversed(kernel.content.waiting):
        done(memoryview(DATA)[offset : offset + length], None)
        error, unique, data = kernel.receive()
        answered[unique] = (error, data)
    assert answered[21] == (0, DATA[half : half + 4096])
    assert answered[25] == (0, DATA[half : half + 100])


def test_the_end_of_the_file(kernel):
    assert kernel.read(len(DATA), 100) == (0, b"")
    assert kernel.read(1 << 60, 100) == (0, b"")
    assert kernel.ask(Opcode.READ, 5, 77, read_body(0, 1))[0] == errno.ENOENT


def test_failures_are_eio_and_say_why(kernel, caplog):
    kernel.send(Opcode.READ, 31, FILE, read_body(len(DATA) - 50, 50))
    while not kernel.content.waiting:
        threading.Event().wait(0.005)
    kernel.content.waiting[0][2](None, RuntimeError("pack sha256:abc is gone"))
    assert kernel.receive()[:2] == (errno.EIO, 31)
    assert "pack sha256:abc is gone" in caplog.text
    kernel.content.waiting.clear()
    kernel.send(Opcode.READ, 32, FILE, read_body(len(DATA) - 50, 50))
    while not kernel.content.waiting:
        threading.Event().wait(0.005)
    kernel.content.waiting[0][2](memoryview(b"short"), None)
    assert kernel.receive()[:2] == (errno.EIO, 32), "too few bytes are no answer"
    kernel.content.broken = ValueError("a bug")
    assert kernel.read(0, 10)[0] == errno.EIO
    kernel.content.broken = None
    assert kernel.read(0, 10) == (0, DATA[:10])


def test_odd_requests_do_not_end_the_server(kernel):
    assert kernel.ask(4095)[0] == errno.ENOSYS
    assert kernel.ask(22, body=b"user.x\0")[0] == errno.ENOSYS  # GETXATTR
    assert kernel.ask(Opcode.READ, node=FILE, body=b"1234")[0] == errno.EIO
    assert kernel.ask(Opcode.GETATTR, length=39)[0] == errno.EIO
    kernel.ours.send(b"tiny")
    for opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
        kernel.send(opcode, 1, body=bytes(16))
    assert kernel.read(0, 3) == (0, DATA[:3])


def test_a_server_that_takes_over_asks_for_lost_requests():
    kernel = Kernel(session=FuseSession(45, int(InitFlag.HAS_RESEND)))
    assert kernel.ours.recv(100) == protocol.resend_notification()
    unique = 5 | protocol.UNIQUE_RESEND
    assert kernel.read(0, 4, unique=unique) == (0, DATA[:4])
    kernel.ours.close()
    assert kernel.server.join(5)


def test_log_lines_are_limited(caplog):
    caplog.set_level(logging.ERROR)
    limit = RateLimit(logging.getLogger("test"), 2, 3600)
    for number in range(50):
        limit.log(logging.ERROR, "failure %d", number)
    assert [record.getMessage() for record in caplog.records] == ["failure 0", "failure 1"]
    limit._begin -= 7200
    limit.log(logging.ERROR, "later")
    assert "48 more" in caplog.text
