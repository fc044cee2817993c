"""Reading a snapshot whose data is all in the node's cache, beside the same EROFS image as a file.

Both are mounted anew for each sample, so that nothing is in the page caches above: those of EROFS
and of the FUSE file. The files below (the node's cache, the plain image) are hot: they are read
once before each sample. Server CPU is what the block server used during the sample.

  tree         every file of the image, by find and cat
  sequential   one large file (--large-mib, made up, does not compress) in pieces of 1 MiB, by dd
  random       4 KiB at random places of it, by fio, one at a time, without readahead

A block server verifies each chunk on its first use, also one from the cache. "Read again" is the
tree or the file read a second time through the same mount, with the page caches above dropped in
between: what reads cost when that is done. "Cold" has nothing in the node's cache: every chunk is
fetched from a store on the same disk, decompressed, verified and kept.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.client import Client
from harness.daemon import mounted_by_daemon, node_daemon
from harness.images import Image, image_or_demo, large_file_image
from harness.options import parser, work_directory
from harness.plain_mount import erofs
from harness.processes import (
    child_environment,
    compile_bytecode,
    cpu_seconds,
    heat,
    measured,
    memory,
    output_of,
    probe,
)
from harness.report import Report, Sample, tell

from imgsnap.node.client import daemon_call

LIMIT_RSS = 64 << 20
AIM_TREE = 1.3
AIM_SEQUENTIAL = 2.0
"""The issue asks for half the rate: twice the time."""
WALK = 'find "$1" -xdev -type f -print0 | xargs -0 cat -- >/dev/null'


@dataclass(frozen=True, slots=True)
class Subject:
    """A converted, warmed and materialised image."""

    reference: str
    plain: Path


def main() -> None:
    found = parser(__doc__, runs=5)
    found.add_argument("--image", default="python-sci", help="of the corpus [python-sci]")
    found.add_argument("--large-mib", type=int, default=256, help="size of the large file [256]")
    found.add_argument("--reads", type=int, default=20_000, help="random reads a sample [20000]")
    arguments = found.parse_args()
    report = Report("read", vars(arguments))
    image = image_or_demo(arguments.corpus, arguments.image)
    report.note(f"image: {image.name}")
    compile_bytecode()
    with work_directory(arguments) as work:
        client = Client(work / "client")
        client.root.mkdir()
        tell(f"read: preparing {image.name} and a file of {arguments.large_mib} MiB")
        large = large_file_image(work / "large", arguments.large_mib)
        bench = _Bench(client, work)
        try:
            steps = _steps(bench, bench.prepare(image), bench.prepare(large), arguments.reads)
            report.interleave(arguments.runs, steps)
        finally:
            client.end()
        if bench.loop:
            report.note("this kernel mounts EROFS through a loop device")
    _figures(report, arguments)
    report.finish()


def _steps(
    bench: "_Bench", image: Subject, large: Subject, reads: int
) -> dict[str, Callable[[], Sample]]:
    work: dict[str, tuple[Subject, Callable[[Path], Sample]]] = {
        "tree": (image, _walk),
        "sequential": (large, _sequential),
        "random": (large, partial(_random, reads)),
    }
    steps: dict[str, Callable[[], Sample]] = {}
    for label, (subject, read) in work.items():
        steps[f"{label}: imgsnap"] = partial(bench.through_imgsnap, subject, read)
        steps[f"{label}: plain"] = partial(bench.through_kernel, subject, read)
        steps[f"{label}: cold"] = partial(bench.cold, subject, read)
        if label != "random":
            steps[f"{label}: again"] = partial(bench.through_imgsnap, subject, read, again=True)
    return steps


class _Bench:
    def __init__(self, client: Client, work: Path) -> None:
        self._client = client
        self._cold = Client(work / "cold")
        self._cold.root.mkdir()
        self._cold.store.symlink_to(client.store)
        self._work = work
        self._target = work / "root"
        self.loop = ""

    def prepare(self, image: Image) -> Subject:
        """Everything that reads need is local: in the cache, and in a plain file."""
        reference = f"store:{image.name}:perf"
        self._client.convert(image.source, reference)
        self._client.run("warm", reference, "--progress", "none")
        plain = self._work / f"{image.name}.erofs"
        places = (self._client.store, self._client.cache, self._client.run_dir)
        probe("materialise_probe", *places, reference, plain)
        return Subject(reference, plain)

    def through_imgsnap(
        self, subject: Subject, read: Callable[[Path], Sample], *, again: bool = False
    ) -> Sample:
        with self._mounted(self._client, subject):
            heat(self._client.cache)
            if again:
                read(self._target)
                self._drop_above()
            return self._sample(self._client, read)

    def cold(self, subject: Subject, read: Callable[[Path], Sample]) -> Sample:
        shutil.rmtree(self._cold.cache, ignore_errors=True)
        heat(self._client.store)
        with self._mounted(self._cold, subject):
            return self._sample(self._cold, read)

    @contextmanager
    def _mounted(self, client: Client, subject: Subject) -> Iterator[None]:
        mount = mounted_by_daemon(client, subject.reference, self._target, "none", one_file=True)
        with node_daemon(client), mount:
            yield

    def _sample(self, client: Client, read: Callable[[Path], Sample]) -> Sample:
        status = daemon_call(client.run_dir, "status")
        pid = status["supervisor"]["server"]
        before = cpu_seconds(pid)
        sample = dict(read(self._target))
        sample["server_cpu_s"] = cpu_seconds(pid) - before
        return sample | memory(pid)

    def through_kernel(self, subject: Subject, read: Callable[[Path], Sample]) -> Sample:
        with self._plain(subject) as target:
            heat(subject.plain)
            return read(target)

    @contextmanager
    def _plain(self, subject: Subject) -> Iterator[Path]:
        target = self._work / "plain"
        with ExitStack() as stack:
            self.loop = stack.enter_context(erofs(subject.plain, target))
            yield target

    def _drop_above(self) -> None:
        """Drops what EROFS and FUSE keep of the files, and nothing of the files below."""
        for directory, _, names in os.walk(self._target):
            for name in names:
                _drop(Path(directory, name))
        for device in self._client.run_dir.glob("node/dev/*/*"):
            _drop(device)


def _drop(path: Path) -> None:
    if path.is_file() and not path.is_symlink():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _walk(root: Path) -> Sample:
    return measured(["sh", "-c", WALK, "sh", root]).as_dict()


def _sequential(root: Path) -> Sample:
    return measured(["dd", f"if={root}/large.bin", "of=/dev/null", "bs=1M"]).as_dict()


def _random(reads: int, root: Path) -> Sample:
    """`wall_s` is the mean time of a read, from fio."""
    file = root / "large.bin"
    number = min(reads, file.stat().st_size // 4096)
    options = {
        "name": "random",
        "filename": file,
        "rw": "randread",
        "bs": "4k",
        "ioengine": "psync",
        "number_ios": number,
        "randrepeat": 1,
        "output-format": "json",
    }
    command = ["fio", "--readonly", *(f"--{key}={value}" for key, value in options.items())]
    text = output_of(command, env=child_environment(), cwd="/tmp")
    job = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    latency = job["clat_ns"]
    return {
        "wall_s": job["runtime"] / 1000 / max(1, job["total_ios"]),
        "reads": job["total_ios"],
        "iops": job["iops"],
        "p50_s": latency["percentile"]["50.000000"] / 1e9,
        "p99_s": latency["percentile"]["99.000000"] / 1e9,
    }


def _figures(report: Report, arguments: argparse.Namespace) -> None:
    aims = {"tree": AIM_TREE, "sequential": AIM_SEQUENTIAL}
    plain = "the same EROFS image as a plain file"
    for label in ("tree", "sequential"):
        ours, other = (report.median(f"{label}: {who}", "wall_s") for who in ("imgsnap", "plain"))
        report.figure(f"{label}, time", ours, "s", plain, other, aims[label])
        again = report.median(f"{label}: again", "wall_s")
        report.figure(f"{label}, time, read again", again, "s", plain, other)
        cold = report.median(f"{label}: cold", "wall_s")
        report.figure(f"{label}, time, cold", cold, "s", plain, other)
    size = arguments.large_mib << 20
    ours, other = (size / report.median(f"sequential: {w}", "wall_s") for w in ("imgsnap", "plain"))
    report.figure("sequential, rate", ours, "B/s", plain, other, 1 / AIM_SEQUENTIAL)
    for key, name in (("iops", "rate a second"), ("p50_s", "median"), ("p99_s", "99th percentile")):
        ours, other = (report.median(f"random: {who}", key) for who in ("imgsnap", "plain"))
        unit = "" if key == "iops" else "us"
        factor = 1 if key == "iops" else 1e6
        report.figure(f"random 4 KiB, {name}", ours * factor, unit, plain, other * factor)
        cold = report.median("random: cold", key)
        report.figure(f"random 4 KiB, {name}, cold", cold * factor, unit, plain, other * factor)
    for label in ("tree", "sequential", "random"):
        key = f"{label}: imgsnap"
        report.figure(
            f"server peak RSS, {label}", report.median(key, "VmHWM"), "B", "limit", LIMIT_RSS, 1.0
        )
        report.figure(f"server CPU, {label}", report.median(key, "server_cpu_s"), "s", "", None)


if __name__ == "__main__":
    main()
