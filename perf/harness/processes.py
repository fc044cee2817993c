"""Child processes: their environment, what they cost, and their certain end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from harness import ROOT

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
END_S = 20.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and those it waited for cost; `max_rss` is in bytes.

    `max_rss` is never below this process's own size at the start of the child: the kernel counts
    the moment between fork and exec.
    """

    wall_s: float
    cpu_s: float
    max_rss: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def child_environment(**extra: str) -> dict[str, str]:
    """As users have it: byte code is cached, no setting of imgsnap's leaks in."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("IMGSNAP_")
        and key not in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")
    }
    return kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'cli'}"} | extra


def compile_bytecode() -> None:
    """Fills the byte code caches, so that the first sample pays no more than the others."""
    command = [sys.executable, "-m", "compileall", "-q", str(ROOT / "imgsnap"), str(ROOT / "cli")]
    subprocess.run(command, env=child_environment(), check=True)


def measured(
    command: Sequence[str | Path],
    *,
    stdin: IO[Any] | None = None,
    environment: dict[str, str] | None = None,
) -> Usage:
    """Runs a command to its end. Raises SystemExit with its last words when it fails."""
    environment = child_environment() if environment is None else environment
    with Path(os.devnull).open() as empty, _scratch() as words:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=stdin or empty, stdout=words, stderr=words, env=environment
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            end_tree(process)
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            words.seek(0)
            raise SystemExit(f"error: {_shown(command)} failed:\n{words.read()[-3000:].decode()}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def output_of(command: Sequence[str | Path], **options: Any) -> str:
    """Standard output of a command. Raises SystemExit with its last words when it fails.

    When we are interrupted, the command and all that it started are ended.
    """
    options.setdefault("env", child_environment())
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)
    try:
        output, errors = process.communicate()
    except BaseException:
        end_tree(process)
        raise
    if process.returncode:
        words = (output + errors)[-3000:]
        raise SystemExit(f"error: {_shown(command)} failed:\n{words}")
    return str(output)


def probe(name: str, *arguments: str | Path) -> str:
    """What `harness.<name>` prints, run in an interpreter of its own."""
    environment = child_environment()
    environment["PYTHONPATH"] += f":{ROOT / 'perf'}"
    return output_of([sys.executable, "-m", f"harness.{name}", *arguments], env=environment)


@contextlib.contextmanager
def running(command: Sequence[str | Path], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A server, ended by its process id when the block is left."""
    options.setdefault("env", child_environment())
    process = subprocess.Popen(command, text=True, **options)
    try:
        yield process
    finally:
        end(process)


def end(process: "subprocess.Popen[Any]") -> None:
    """SIGTERM, then SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_tree(process: "subprocess.Popen[Any]") -> None:
    """As `end`, its descendants too: some, as containers, live in sessions of their own."""
    descendants = _descendants(process.pid)
    end(process)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_S / 4
        for pid in descendants:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while descendants and time.monotonic() < deadline:
            descendants = [pid for pid in descendants if Path(f"/proc/{pid}").exists()]
            time.sleep(0.05)


def _descendants(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [item for child in children for item in (*_descendants(int(child)), int(child))]


def cpu_seconds(pid: int) -> float:
    """User and system time so far of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * TICK_S


def memory(pid: int) -> dict[str, int]:
    """Bytes of VmHWM (peak), VmRSS, RssAnon, RssFile and RssShmem of a process."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    names = ("VmHWM:", "VmRSS:", "RssAnon:", "RssFile:", "RssShmem:")
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line and line[0] in names}


def proportional_memory(pid: int) -> int:
    """Bytes of a process's memory, each page divided among those who share it (Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"error: process {pid} has no Pss")


def drop_page_caches() -> bool:
    """Writes back and drops the machine's page cache; False without the right to."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def heat(path: Path) -> None:
    """Reads a file or all files below a directory into the page cache."""
    output_of(
        ["sh", "-c", 'find "$1" -name tmp -prune -o -type f -exec cat {} + >/dev/null', "sh", path]
    )


@contextlib.contextmanager
def _scratch() -> Iterator[IO[bytes]]:
    from tempfile import TemporaryFile

    with TemporaryFile() as file:
        yield file


def _shown(command: Sequence[str | Path]) -> str:
    return " ".join(str(part) for part in command)
