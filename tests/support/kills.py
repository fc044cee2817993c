"""Readers that check every byte while the block server below them is killed again and again."""

import contextlib
import mmap
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.errors import ImgsnapError
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc


@dataclass
class Outcome:
    """What the readers saw; times in seconds."""

    kills: int = 0
    reads: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        return sorted(self.stalls)[min(len(self.stalls) - 1, int(len(self.stalls) * share))]

    def summary(self) -> dict:
        return {
            "kills": self.kills,
            "reads": self.reads,
            "wrong": len(self.wrong),
            "errors": len(self.errors),
            "p50_ms": round(self.percentile(0.5) * 1000, 2),
            "p99_ms": round(self.percentile(0.99) * 1000, 1),
            "p999_ms": round(self.percentile(0.999) * 1000, 1),
            "max_ms": round(max(self.stalls) * 1000, 1),
        }


class KillRun:
    """Random and sequential direct reads of a device file, and reads of the tree over it."""

    def __init__(
        self, device_file: Path, content: bytes, trees: tuple[Path, Path], socket: Path
    ) -> None:
        self.outcome = Outcome()
        self._file = device_file
        self._content = content
        self._expected, self._tree = trees
        self._socket = socket
        self._end = threading.Event()
        self._lock = threading.Lock()

    def run(
        self,
        kills: int,
        *,
        supervisor: ProcessId,
        damage: Path | None = None,
        seed: int = 0,
        pause_s: tuple[float, float] = (0.0, 0.12),
    ) -> Outcome:
        """Kills as often as asked. With `damage` some cached chunks are zeroed while no server
        runs, as a power cut that lost data pages would leave them."""
        work = [self._random, self._random, self._sequential, self._files]
        threads = [
            threading.Thread(target=self._guard, args=(one, random.Random(seed * 100 + number)))
            for number, one in enumerate(work)
        ]
        for thread in threads:
            thread.start()
        rng = random.Random(seed)
        last = None
        try:
            while self.outcome.kills < kills and not self.outcome.errors + self.outcome.wrong:
                time.sleep(rng.uniform(*pause_s))
                last = self._kill(supervisor, last, damage, rng)
        finally:
            self._end.set()
            for thread in threads:
                thread.join(90)
        if any(thread.is_alive() for thread in threads):
            self.outcome.errors.append("a reader hangs")
        return self.outcome

    def _kill(self, supervisor, last, damage, rng) -> int | None:
        try:
            pid = rpc.call(self._socket, "status", timeout_s=20)["pid"]
        except ImgsnapError:
            return last  # it died while it answered
        if pid == last:
            return last
        if damage is not None and rng.random() < 0.3:
            os.kill(supervisor.pid, signal.SIGSTOP)
            try:
                server = ProcessId.of(pid)
                os.kill(pid, signal.SIGKILL)
                assert server.wait(10)
                _zero_some(damage, rng)
            finally:
                os.kill(supervisor.pid, signal.SIGCONT)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.outcome.kills += 1
        return pid

    # Readers ---------------------------------------------------------------------------------

    def _guard(self, work, rng) -> None:
        try:
            while not self._end.is_set():
                work(rng)
        except BaseException as error:
            self.outcome.errors.append(f"{type(error).__name__}: {error}")

    def _note(self, started: float, right: bool, what: str) -> None:
        with self._lock:
            self.outcome.stalls.append(time.monotonic() - started)
            self.outcome.reads += 1
            if not right:
                self.outcome.wrong.append(what)

    def _direct(self, offset: int, length: int) -> None:
        """Past every page cache, so that each read reaches the server."""
        fd = os.open(self._file, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, length)
        try:
            started = time.monotonic()
            count = os.preadv(fd, [buffer], offset)
            expected = self._content[offset : offset + length]
            self._note(started, buffer[:count] == expected, f"{length} bytes at {offset}")
        finally:
            buffer.close()
            os.close(fd)

    def _random(self, rng) -> None:
        length = rng.choice((4096, 4096, 16384, 131072, 1 << 20))
        self._direct(rng.randrange(len(self._content) // 4096) * 4096, length)

    def _sequential(self, rng) -> None:
        start = rng.randrange(len(self._content) // 4096) * 4096
        for offset in range(start, min(start + (8 << 20), len(self._content)), 1 << 18):
            if self._end.is_set():
                return
            self._direct(offset, 1 << 18)

    def _files(self, rng) -> None:
        """Through EROFS, whose page cache and that below it are dropped before each file."""
        names = [path for path in self._expected.rglob("*") if path.is_file()]
        path = rng.choice(names)
        shown = self._tree / path.relative_to(self._expected)
        for victim in (shown, self._file):
            fd = os.open(victim, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        started = time.monotonic()
        self._note(started, shown.read_bytes() == path.read_bytes(), str(path))


def _zero_some(cache: Path, rng: random.Random) -> None:
    for path in cache.glob("v1/extents/*/data"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            for _ in range(8):
                file.seek(rng.randrange(0, max(1, size - 65536)))
                file.write(bytes(rng.choice((4096, 65536))))
            file.flush()
            os.ftruncate(file.fileno(), size)
