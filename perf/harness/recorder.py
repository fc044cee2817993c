"""A loopback proxy that notes when each HTTP request was sent and when its answer ended.

From these times follows how many round trips a client waited for one after the other: the longest
chain of requests each of which began after the one before it had ended. Count with a round-trip
time of some size, so that what a client sends at once really overlaps.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

PIECE = 64 << 10


@dataclass(slots=True)
class Exchange:
    """A request and the time its answer took; seconds of the monotonic clock."""

    line: str
    began: float
    ended: float
    received: int = 0  # bytes of the answer, head and body


@dataclass
class Recorder:
    """``with Recorder(port) as recorder: connect to 127.0.0.1:recorder.port``"""

    target_port: int
    port: int = 0
    connections: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def reset(self) -> None:
        self.connections = 0
        self.exchanges = []

    def counts(self) -> dict[str, int]:
        """Requests, sequential round trips, connections, and bytes to the client."""
        return {
            "requests": len(self.exchanges),
            "sequential": longest_chain(self.exchanges),
            "connections": self.connections,
            "received": sum(exchange.received for exchange in self.exchanges),
        }

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            peer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=PIECE)
        except OSError:
            writer.close()
            return
        connection = _Connection(self.exchanges)
        with contextlib.suppress(asyncio.CancelledError):  # the proxy ends before its clients
            await asyncio.gather(
                _pump(reader, peer[1], connection.sent),
                _pump(peer[0], writer, connection.answered),
            )


class _Connection:
    """One connection without pipelining: what follows an answer is the next request."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges = exchanges
        self._open: Exchange | None = None
        self._answering = True

    def sent(self, data: bytes) -> None:
        if self._answering:
            line = data.partition(b"\r\n")[0].decode("latin-1")
            now = time.monotonic()
            self._open = Exchange(line, now, now)
            self._exchanges.append(self._open)
            self._answering = False

    def answered(self, data: bytes) -> None:
        if self._open is not None:
            self._answering = True
            self._open.ended = time.monotonic()
            self._open.received += len(data)


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, note: Callable[[bytes], None]
) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(PIECE):
            note(data)
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.close()


def longest_chain(exchanges: list[Exchange]) -> int:
    """The most exchanges of which each began after the one before it had ended."""
    count, free = 0, float("-inf")
    for exchange in sorted(exchanges, key=lambda item: item.ended):
        if exchange.began >= free:
            count, free = count + 1, exchange.ended
    return count
