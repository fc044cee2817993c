"""The node daemon: mounts through it and without it, restarts, kills, many snapshots at once.

Mounts: `--mounts` different snapshots, of a registry on loopback, mounted at once and read whole.
Restart: the control process is killed and started with `--known` attachments on disk, until it
answers. Stall: the longest pause of a reader of uncached blocks while the block server is killed,
`--kills` times; an undisturbed read of the same stands beside it.
"""

import json
import mmap
import os
import random
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.images import large_file_image
from harness.options import parser, work_directory
from harness.processes import child_environment, compile_bytecode, end, memory, output_of
from harness.registry import docker_registry, push
from harness.report import Report, Sample

AIM_RESTART_S = 0.2
AIM_STALL_S = 1.0
ANSWER_S = 30.0


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument("--mounts", type=int, default=50, help="different snapshots [50]")
    found.add_argument("--mib", type=int, default=2, help="size of each [2]")
    found.add_argument("--known", type=int, default=10_000, help="attachments on disk [10000]")
    found.add_argument("--kills", type=int, default=100, help="of the block server [100]")
    arguments = found.parse_args()
    report = Report("node", vars(arguments))
    compile_bytecode()
    with work_directory(arguments) as work, docker_registry(work) as registry:
        client = Client(work / "client")
        client.root.mkdir()
        references = _snapshots(client, registry.address, work, arguments)
        bench = _Bench(client, references, work, arguments)
        try:
            report.interleave(
                arguments.runs,
                {
                    "mounts, daemon": lambda: bench.many(daemon=True),
                    "mounts, private servers": lambda: bench.many(daemon=False),
                    "restart": bench.restart,
                },
            )
            report.interleave(1, {"kills": bench.kills})
        finally:
            bench.end()
            client.end()
    _figures(report, arguments)
    report.finish()


def _snapshots(client: Client, address: str, work: Path, arguments: Any) -> list[str]:
    references = []
    for number in range(arguments.mounts):
        image = large_file_image(work / f"image{number}", arguments.mib, seed=number)
        source = push(image, address, f"image{number}")
        target = f"{address}/image{number}:snap"
        client.convert(source, target, "--plain-http")
        references.append(target)
    return references


class _Bench:
    def __init__(self, client: Client, references: list[str], work: Path, arguments: Any) -> None:
        self._client = client
        self._references = references
        self._work = work
        self._arguments = arguments
        self._daemon: subprocess.Popen[Any] | None = None

    # The daemon ------------------------------------------------------------------------------

    def _call(self, name: str, operation: str, **args: Any) -> Any:
        path = self._client.run_dir / name
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(path))
            connection.sendall(json.dumps({"op": operation, "args": args}).encode() + b"\n")
            answer = b""
            while data := connection.recv(1 << 20):
                answer += data
        return json.loads(answer)["result"]

    def _start(self) -> float:
        """Seconds until the control socket answers."""
        started = time.perf_counter()
        command = self._client.command("daemon", "run")
        self._daemon = subprocess.Popen(command, env=child_environment())
        while True:
            try:
                self._call("control.sock", "status")
                return time.perf_counter() - started
            except (OSError, KeyError):
                assert time.perf_counter() - started < ANSWER_S
                time.sleep(0.002)

    def _ready(self) -> dict[str, Any]:
        while True:
            try:
                return dict(self._call("node/block.sock", "status"))
            except OSError:
                time.sleep(0.01)

    def end(self) -> None:
        if self._daemon is not None:
            output_of(self._client.command("daemon", "stop", "--force"))
            end(self._daemon)
            self._daemon = None

    # Samples ---------------------------------------------------------------------------------

    def many(self, *, daemon: bool) -> Sample:
        """All snapshots mounted at once, four commands at a time, and each read whole."""
        self._client.forget_data()
        if daemon:
            self._start()
            self._ready()
        targets = [self._work / f"tree{n}" for n in range(len(self._references))]
        walls: list[float] = []

        def mount(pair: tuple[str, Path]) -> None:
            walls.append(self._client.mount(pair[0], pair[1], "--plain-http").wall_s)

        started = time.perf_counter()
        try:
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(mount, zip(self._references, targets, strict=True)))
            mounted = time.perf_counter() - started
            for target in targets:
                (target / "large.bin").read_bytes()
            read = time.perf_counter() - started
            if daemon:
                rss = memory(self._ready()["pid"])["VmRSS"]
            else:
                rss = sum(memory(self._client.server_pid(target))["RssAnon"] for target in targets)
        finally:
            output_of(self._client.command("umount", "--all"))
            self.end()
        return {
            "mounted_s": mounted,
            "read_s": read,
            "p50_s": sorted(walls)[len(walls) // 2],
            "rss": rss,
        }

    def restart(self) -> Sample:
        """The control process killed and started again while it knows many snapshots."""
        self._client.forget_data()  # a complete one would be mounted without the daemon
        self._start()
        self._ready()
        target = self._work / "tree"
        self._client.mount(self._references[0], target, "--plain-http")
        try:
            self._make_known()
            assert self._daemon is not None
            self._daemon.kill()
            self._daemon.wait()
            os.kill(self._ready()["pid"], signal.SIGKILL)
            control = self._start()
            before = time.perf_counter()
            (target / "large.bin").read_bytes()
            read = time.perf_counter() - before
            listing = time.perf_counter()
            known = len(self._call("control.sock", "attachments"))
            listing = time.perf_counter() - listing
        finally:
            output_of(self._client.command("umount", "--all"))
            self.end()
        return {"answers_s": control, "first_read_s": read, "known": known, "list_s": listing}

    def _make_known(self) -> None:
        directory = self._client.run_dir / "node/attachments"
        (record,) = (directory / "number").glob("*.json")
        text, value = record.read_text(), json.loads(record.read_text())
        first = value["number"]
        for number in range(first + 1, first + self._arguments.known):
            path = directory / "number" / f"{number}.json"
            name = f"{number:064x}"
            changed = text.replace(f'"number": {first}', f'"number": {number}')
            path.write_text(changed.replace(value["id"], name))
            os.link(path, directory / "id" / f"{name}.json")

    def kills(self) -> Sample:
        """Stalls of direct 64 KiB reads of a device while its server is killed."""
        self._client.forget_data()
        self._start()
        self._ready()
        target = self._work / "tree"
        self._client.mount(self._references[0], target, "--plain-http")
        try:
            (attachment,) = self._call("control.sock", "attachments")
            device = self._client.run_dir / "node/dev" / attachment["id"] / "layer.erofs"
            quiet = self._read_for(device, 2.0)
            stop = threading.Event()
            stalls: list[float] = []
            readers = [
                threading.Thread(target=lambda: stalls.extend(self._read_until(device, stop)))
                for _ in range(2)
            ]
            for reader in readers:
                reader.start()
            for _ in range(self._arguments.kills):
                os.kill(self._ready()["pid"], signal.SIGKILL)
                time.sleep(0.05)
            stop.set()
            for reader in readers:
                reader.join()
        finally:
            output_of(self._client.command("umount", "--all"))
            self.end()
        return {
            "quiet_p99_s": _share(quiet, 0.99),
            "p99_s": _share(stalls, 0.99),
            "max_s": max(stalls),
            "reads": len(stalls),
        }

    def _read_for(self, device: Path, seconds: float) -> list[float]:
        stop = threading.Event()
        timer = threading.Timer(seconds, stop.set)
        timer.start()
        return self._read_until(device, stop)

    def _read_until(self, device: Path, stop: threading.Event) -> list[float]:
        size = device.stat().st_size
        rng = random.Random(1)
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
        buffer = mmap.mmap(-1, 65536)
        walls = []
        try:
            while not stop.is_set():
                before = time.perf_counter()
                os.preadv(fd, [buffer], rng.randrange(size // 65536) * 65536)
                walls.append(time.perf_counter() - before)
        finally:
            os.close(fd)
        return walls


def _share(values: list[float], share: float) -> float:
    return sorted(values)[int(len(values) * share)]


def _figures(report: Report, arguments: Any) -> None:
    count = arguments.mounts
    daemon, private = "mounts, daemon", "mounts, private servers"
    for key, label in (
        ("mounted_s", f"{count} snapshots mounted"),
        ("read_s", f"{count} mounted and read"),
        ("p50_s", "one mount command, median"),
    ):
        report.figure(
            label, report.median(daemon, key), "s", "private servers", report.median(private, key)
        )
    report.figure(
        f"server memory, {count} snapshots",
        report.median(daemon, "rss"),
        "B",
        "private servers, anonymous memory only",
        report.median(private, "rss"),
    )
    report.figure(
        f"restart until answering, {arguments.known} known",
        report.median("restart", "answers_s"),
        "s",
        "aim",
        AIM_RESTART_S,
        1.0,
    )
    report.figure("first read after it", report.median("restart", "first_read_s"), "s", "", None)
    report.figure(
        f"p99 of reads under {arguments.kills} kills",
        report.median("kills", "p99_s"),
        "s",
        "aim",
        AIM_STALL_S,
        1.0,
    )
    report.figure(
        "longest read under kills",
        report.median("kills", "max_s"),
        "s",
        "quiet p99",
        report.median("kills", "quiet_p99_s"),
    )


if __name__ == "__main__":
    main()
