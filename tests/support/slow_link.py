"""A TCP forwarder whose flow a test can hold: a registry that is slow, or does not go on."""

import contextlib
import socket
import threading
from collections.abc import Iterator

PIECE = 16 << 10


class SlowLink:
    """Forwards connections to `port`; lets `allowance` bytes of answers through on each, then waits
    for `open`. `reached` is set when one begins to wait."""

    def __init__(self, port: int, allowance: int) -> None:
        self.reached = threading.Event()
        self._port = port
        self._allowance = allowance
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._closing = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._run(self._accept)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def open(self) -> None:
        """Lets everything through from now on."""
        self._open.set()

    def close(self) -> None:
        self._closing = True
        self._open.set()
        with self._lock:
            everything = [self._listener, *self._sockets]
        for one in everything:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in list(self._threads):
            thread.join()

    def _run(self, function, *arguments) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                return
            with self._lock:
                self._sockets += [client, server]
            self._run(self._forward, client, server, False)
            self._run(self._forward, server, client, True)

    def _forward(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            passed = 0
            while data := source.recv(PIECE):
                passed += len(data)
                if counted and passed > self._allowance and not self._open.is_set():
                    self.reached.set()
                    self._open.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def slow_link(port: int, allowance: int) -> Iterator[SlowLink]:
    link = SlowLink(port, allowance)
    try:
        yield link
    finally:
        link.close()
