"""A running guest: its process, its console, and the control line to its init.

The control line is the guest's second serial port; init/init.sh has the protocol. Every run is
named by a token that only the host and the guest's process 1 know, so a status cannot come from
elsewhere.
"""

import base64
import contextlib
import math
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from imgsnap.errors import IntegrityError, InvalidArgument, OutOfTime, Unavailable
from imgsnap.vm.qemu import Boot, Drive, Hardware, command_line

START_LIMIT_S = 90.0
"""From the start of QEMU to the guest's init; under emulation on a busy host it takes 10 s."""
READY_LIMIT_S = 180.0
"""From there to the mounted root: as long as a registry may take over it."""
SCRIPT_MAX = 2048
"""Bytes of one script: the guest's side of the line has a buffer of 4096."""
_LOG_MAX = 64 << 10
_LINE_MAX = 4096
_READ = 64 << 10
_END_GRACE_S = 5.0
_DIED_WITH_US = "KILL"

Output = Callable[[bytes], None]


OUTPUT_LIMIT_S = 20.0
"""For output that is on its way when its command has ended."""


class GuestStopped(Unavailable):
    """The guest or its QEMU ended, or never came up."""


class Machine:
    """One QEMU. Use it as a context manager: leaving ends the process."""

    def __init__(
        self,
        qemu: str,
        hardware: Hardware,
        boot: Boot,
        *,
        prefix: Sequence[str] = (),
        deadline: float = math.inf,
    ) -> None:
        """Starts it; `prefix` goes before QEMU's command. After `deadline`, a time of the monotonic
        clock, everything raises OutOfTime. Raises OSError."""
        self._deadline = deadline
        self._console, console = socket.socketpair()
        self._control, control = socket.socketpair()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._log = bytearray()  # the console until somebody wants it
        self._lines = bytearray()
        lines = (console.fileno(), control.fileno())
        drives: list[Drive] = []
        try:
            drives += map(_inherited, hardware.drives)
            hardware = replace(hardware, drives=tuple(drives))
            arguments = [*prefix, *command_line(qemu, hardware, boot, *lines)]
            self.process = subprocess.Popen(
                [*_bound_to_us(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                pass_fds=[*lines, *(drive.fd for drive in drives if drive.fd is not None)],
                start_new_session=True,  # a terminal's Ctrl-C is for us, or for the guest
            )
        except BaseException:
            self._release()
            raise
        finally:
            console.close()
            control.close()
            for drive in drives:
                if drive.fd is not None:
                    os.close(drive.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the guest, at once: nothing of it is to be kept."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                try:
                    self.process.wait(_END_GRACE_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
            self.process.wait()
        finally:
            self._release()

    def _release(self) -> None:
        self._console.close()
        self._control.close()
        self._errors.close()

    def wait_started(self, limit_s: float = START_LIMIT_S) -> None:
        """Returns when the guest's kernel is up. Raises GuestStopped, also for the time."""
        self._expect("started", limit_s)

    def wait_ready(self, limit_s: float = READY_LIMIT_S) -> None:
        """Returns when the guest's root is mounted, after `wait_started`. Raises GuestStopped, also
        for the time, and IntegrityError when the guest refuses its disk."""
        self._expect("ready", limit_s)

    def _expect(self, wanted: str, limit_s: float) -> None:
        try:
            word, _ = self._answer(time.monotonic() + limit_s, self._keep, None)
        except OutOfTime as error:
            if time.monotonic() >= self._deadline:
                raise
            raise GuestStopped(
                f"the guest did not say {wanted!r} within {limit_s:g} s", hint=error.hint
            ) from error
        if word != wanted:
            raise GuestStopped(f"the guest said {word!r} before it was {wanted}")

    def run(
        self,
        script: str,
        output: Output,
        *,
        keyboard: int | None = None,
        limit_s: float = math.inf,
    ) -> int:
        """Runs a shell script in the guest with its console as terminal; its exit status.

        The console's bytes go to `output`; what can be read from the descriptor `keyboard` goes to
        the console. Raises InvalidArgument for a script over SCRIPT_MAX bytes, GuestStopped,
        OutOfTime.
        """
        encoded = base64.b64encode(script.encode())
        if len(script.encode()) > SCRIPT_MAX:
            raise InvalidArgument(f"a guest's script has at most {SCRIPT_MAX} bytes")
        token = secrets.token_hex(16)
        until = _Until(b"\0end %s\0" % token.encode(), output)
        self._drain(self._keep)
        self._control.sendall(b"run %s %s\n" % (token.encode(), encoded))
        deadline = time.monotonic() + limit_s
        while True:
            word, rest = self._answer(deadline, until, keyboard)
            said, _, status = rest.partition(" ")
            if word == "exit" and secrets.compare_digest(said, token) and status.isdigit():
                self._finish(until)
                return int(status)

    def _finish(self, until: "_Until") -> None:
        """The rest of a command's output, which comes on a line of its own."""
        deadline = time.monotonic() + OUTPUT_LIMIT_S
        while not until.seen and self._ready(self._console, deadline):
            if not self._pass_on(until):
                break
        until.close()

    @staticmethod
    def _ready(side: socket.socket, deadline: float) -> bool:
        left = deadline - time.monotonic()
        return left > 0 and bool(select.select([side], [], [], left)[0])

    def boot_log(self) -> str:
        """The end of what the console had before the first command."""
        return self._log.decode(errors="replace")

    def _answer(self, deadline: float, output: Output, keyboard: int | None) -> tuple[str, str]:
        """The next line of the guest: its first word, and the rest."""
        while b"\n" not in self._lines:
            self._pump(deadline, output, keyboard)
        line, _, rest = bytes(self._lines).partition(b"\n")
        self._lines[:] = rest
        word, _, more = line.decode(errors="replace").strip().partition(" ")
        if word == "failed":
            raise GuestStopped(f"the guest did not come up: {more}")
        if word == "refused":
            raise IntegrityError(
                f"the guest did not come up: {more}",
                hint="imgsnap check REF says whether the snapshot or this machine is at fault",
            )
        return word, more

    def _pump(self, deadline: float, output: Output, keyboard: int | None) -> None:
        """Waits for one thing to happen on any side, and passes it on."""
        left = min(deadline, self._deadline) - time.monotonic()
        if left <= 0:
            raise OutOfTime("the guest's time is over", hint=self._hint())
        sides: list[socket.socket | int] = [self._control, self._console]
        sides += [] if keyboard is None else [keyboard]
        ready, _, _ = select.select(sides, [], [], None if math.isinf(left) else left)
        if self._console in ready:
            self._pass_on(output)
        if keyboard in ready and keyboard is not None:
            self._type(keyboard)
        if self._control in ready:
            self._hear()

    def _pass_on(self, output: Output) -> bool:
        data = self._receive(self._console)
        if data:
            output(data)
        return bool(data)

    def _hear(self) -> None:
        data = self._receive(self._control)
        if not data:
            self._drain(self._keep)
            raise GuestStopped("the guest stopped", hint=self._hint())
        self._lines += data
        if len(self._lines) > _LINE_MAX:
            raise GuestStopped("the guest's init does not keep to its protocol")

    def _type(self, keyboard: int) -> None:
        data = os.read(keyboard, _READ)
        with contextlib.suppress(OSError):
            self._console.sendall(data)

    def _drain(self, output: Output) -> None:
        while select.select([self._console], [], [], 0)[0] and self._pass_on(output):
            pass

    @staticmethod
    def _receive(side: socket.socket) -> bytes:
        try:
            return side.recv(_READ)
        except ConnectionError:
            return b""

    def _keep(self, data: bytes) -> None:
        self._log += data
        del self._log[:-_LOG_MAX]

    def _hint(self) -> str | None:
        """The last thing that QEMU or the console said."""
        self._errors.seek(0)
        said = self._errors.read(_LOG_MAX).decode(errors="replace").strip()
        lines = [line.strip() for line in (said or self.boot_log()).splitlines() if line.strip()]
        return f"it said: {lines[-1][:300]}" if lines else None


class _Until:
    """Passes bytes on up to a mark, without it; what may be its beginning is held back."""

    def __init__(self, mark: bytes, output: Output) -> None:
        self.seen = False
        self._mark = mark
        self._output = output
        self._held = b""

    def __call__(self, data: bytes) -> None:
        if self.seen:
            return
        data = self._held + data
        before, mark, _ = data.partition(self._mark)
        self.seen = bool(mark)
        kept = 0 if mark else self._begun(before)
        self._held = before[len(before) - kept :]
        self._pass(before[: len(before) - kept])

    def close(self) -> None:
        """No mark will come."""
        self._pass(self._held)
        self._held = b""

    def _begun(self, data: bytes) -> int:
        """How many bytes at the end may be the beginning of the mark."""
        longest = min(len(data), len(self._mark) - 1)
        return next((n for n in range(longest, 0, -1) if self._mark.startswith(data[-n:])), 0)

    def _pass(self, data: bytes) -> None:
        if data:
            self._output(data)


def _bound_to_us() -> list[str]:
    """Words before a command that make the kernel kill it when this process dies."""
    program = shutil.which("setpriv")
    return [program, "--pdeathsig", _DIED_WITH_US] if program else []


def _inherited(drive: Drive) -> Drive:
    """A read-only file as one that is open, and that the host's kernel does not read ahead in.

    The guest's kernel does that. A second readahead fetches what no guest asked for, and not the
    same each time: a boot then waits for blocks that its boot pack lacks. Raises OSError.
    """
    if not drive.read_only or not drive.path.is_file():
        return drive
    fd = os.open(drive.path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return replace(drive, fd=fd)


def write_initramfs(directory: Path, data: bytes) -> Path:
    """The initramfs as a file that QEMU reads. Raises OSError."""
    path = directory / "initramfs.cpio"
    path.write_bytes(data)
    return path
