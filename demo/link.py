"""A slow link to a local server: bandwidth and round-trip time for the demo.

Each direction passes a bucket of `rate` and is held for half a round trip; a new connection pays
one round trip more, for its handshake. Bytes towards the client are counted.
"""

import asyncio
import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

PIECE = 16 << 10


@dataclass
class _Bucket:
    """When the link is free again; one per direction, shared by all connections."""

    rate: float  # bytes a second; 0: unlimited
    free: float = 0.0

    def pass_at(self, now: float, size: int) -> float:
        """The time at which `size` bytes have passed."""
        self.free = max(self.free, now) + (size / self.rate if self.rate else 0.0)
        return self.free


@dataclass
class Link:
    """``with Link(port, rate_bits, rtt_s) as link: connect to 127.0.0.1:link.port``"""

    target_port: int
    rate_bits: float = 0.0
    rtt_s: float = 0.0
    port: int = 0
    received: int = 0  # bytes towards the client
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __enter__(self) -> Self:
        self._down, self._up = _Bucket(self.rate_bits / 8), _Bucket(self.rate_bits / 8)
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

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=PIECE)
        )
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.rtt_s)
        try:
            peer = await asyncio.open_connection("127.0.0.1", self.target_port, limit=PIECE)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._pump(reader, peer[1], self._up, count=False),
            self._pump(peer[0], writer, self._down, count=True),
        )

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        bucket: _Bucket,
        *,
        count: bool,
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)

        async def fill() -> None:
            while data := await reader.read(PIECE):
                passed = bucket.pass_at(self._loop.time(), len(data))
                await queue.put((passed + self.rtt_s / 2, data))
                # Backpressure: no more than 50 ms of the link in flight, as a router would hold.
                ahead = passed - self._loop.time() - 0.05
                if ahead > 0:
                    await asyncio.sleep(ahead)
            await queue.put((0.0, b""))

        task = self._loop.create_task(fill())
        with contextlib.suppress(OSError):
            while True:
                when, data = await queue.get()
                if not data:
                    break
                delay = when - self._loop.time()
                if delay > 0:
                    await asyncio.sleep(delay)
                if count:
                    self.received += len(data)
                writer.write(data)
                await writer.drain()
        task.cancel()
        with contextlib.suppress(OSError, RuntimeError):
            writer.close()
