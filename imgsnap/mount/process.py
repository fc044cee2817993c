"""Processes: telling one apart from a later one with its pid, detaching, ending."""

import contextlib
import os
import select
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STAT_STATE = 0
_STAT_START_TIME = 19
"""Fields of /proc/<pid>/stat counted after the command's closing parenthesis."""


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A pid with the process's start time (clock ticks since boot), which no successor shares."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "ProcessId":
        """Raises ProcessLookupError when there is no such process."""
        fields = _stat(pid)
        if fields is None:
            raise ProcessLookupError(pid)
        return cls(pid, int(fields[_STAT_START_TIME]))

    @property
    def alive(self) -> bool:
        """False too for a zombie: it holds nothing any more."""
        fields = _stat(self.pid) if self.pid > 0 else None
        if fields is None or fields[_STAT_STATE] in ("Z", "X"):
            return False
        return int(fields[_STAT_START_TIME]) == self.start_time

    def wait(self, timeout_s: float) -> bool:
        """Waits until the process has ended; False when it has not by then."""
        if not self.alive:
            return True
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # The pid may have been reused before pidfd_open; then `alive` tells.
            if self.alive:
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                poll.poll(timeout_s * 1000)
            return not self.alive
        finally:
            os.close(fd)

    def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL when that has not helped within `grace_s`."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self.alive:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            if self.wait(grace_s):
                return


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def start_detached(run: Callable[[int], None]) -> int:
    """Runs `run(pipe)` in a new session's process that is no child of ours.

    Returns the reading end of the pipe. The new process keeps nothing of this one but memory:
    all descriptors but the pipe are closed, so that a caller's pipes and locks end with the
    caller. Call it before any thread exists: only the calling thread lives on in the copy.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child:
        os.close(writer)
        os.waitpid(child, 0)
        return reader
    try:
        os.setsid()
        # A second fork: the server can never get a controlling terminal, and init reaps it.
        if os.fork() == 0:
            _close_descriptors(writer)
            run(writer)
    except BaseException:
        os._exit(1)
    os._exit(0)


def _close_descriptors(keep: int) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, os.sysconf("SC_OPEN_MAX"))


def processes_with_open(path: Path) -> list[int]:
    """Processes that have a file open, or mapped without it; of this pid namespace, by number.

    Kernel users, such as a loop device or EROFS, do not show here. Raises OSError.
    """
    wanted = path.stat()
    identity = (wanted.st_dev, wanted.st_ino)
    return sorted(
        int(process.name)
        for process in Path("/proc").iterdir()
        if process.name.isdigit() and _has_open(process, path.name, identity)
    )


def _has_open(process: Path, name: str, identity: tuple[int, int]) -> bool:
    for kind in ("fd", "map_files"):
        try:
            links = list((process / kind).iterdir())
        except OSError:
            continue  # it has ended, or is another user's
        for link in links:
            try:
                # By name first: stat(2) may ask a file system that does not answer.
                if link.readlink().name != name:
                    continue
                found = link.stat()
            except OSError:
                continue
            if (found.st_dev, found.st_ino) == identity:
                return True
    return False
