"""Cold starts with and without a boot pack, over links of several kinds, beside what a link allows.

For each image a start is recorded by `imgsnap trace` and made into a boot pack; then, for each link
and round, from an empty node cache: a mount by the node daemon and the corpus's start task in the
mounted root, without a pack and with it. Programs of the machine stay in the page cache, as on a
node that starts many containers. The limit is

    pack bytes / link rate + 3 round trips + ready time from a warm local disk

where the local ready time is that of the same task on the same EROFS image as a plain file.

Requests and bytes are counted by the registry behind the link, sequential round trips by a proxy
before it in samples of their own: the longest chain of requests each of which began after the one
before it had ended. Needs root, the corpus and its tools.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.daemon import mounted_by_daemon, node_daemon
from harness.images import Image, corpus_image
from harness.options import parser, skip, work_directory
from harness.plain_mount import erofs
from harness.processes import compile_bytecode, heat, output_of, probe
from harness.recorder import Recorder
from harness.registry import push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

IMAGES = (
    *("busybox", "debian-base", "python-slim", "nginx", "python-app", "python-app-v2"),
    *("gcc", "node", "python-sci", "python-sci-v2"),
)
LINKS = ("100mbit/10ms", "1gbit/2ms", "25mbit/30ms", "100mbit/200ms")
AIM_READY = 1.3
AIM_BYTES = 1.15
TRIPS_MAX = 3
_RATES = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True, slots=True)
class Link:
    """`rate` and `rtt` as shaped-registry takes them."""

    rate: str
    rtt: str

    @property
    def label(self) -> str:
        return f"{self.rate}/{self.rtt}"

    def seconds(self, size: float, trips: int) -> float:
        unit = self.rate.lstrip("0123456789.")
        bits = float(self.rate.removesuffix(unit)) * _RATES[unit]
        return size * 8 / bits + trips * float(self.rtt.removesuffix("ms")) / 1000


@dataclass(frozen=True, slots=True)
class How:
    """What is mounted."""

    pack: str | None  # as --boot-pack takes it
    by_digest: bool = False  # as a snapshotter does, which has looked the digest up


KINDS = {"no pack": How("none"), "pack": How(None), "pack by digest": How(None, by_digest=True)}


@dataclass(frozen=True, slots=True)
class Subject:
    """A published image with its boot pack."""

    image: Image
    digest: str  # of its snapshot
    pack: dict[str, Any]  # what `imgsnap optimize` said
    local_s: float


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument("--images", nargs="+", metavar="NAME", default=list(IMAGES))
    found.add_argument("--links", nargs="+", metavar="RATE/RTT", default=list(LINKS))
    arguments = found.parse_args()
    tools = _checked_tools(arguments)
    links = [Link(*text.split("/")) for text in arguments.links]
    images = [corpus_image(arguments.corpus, name) for name in arguments.images]
    report = Report("boot", vars(arguments))
    compile_bytecode()
    subjects: list[Subject] = []
    with work_directory(arguments) as work:
        client = Client(work / "client")
        client.root.mkdir()
        try:
            for link in links:
                with shaped_registry(tools, work / "storage", link.rate, link.rtt) as registry:
                    bench = _Bench(client, registry, tools, work)
                    if not subjects:
                        subjects = [bench.prepare(image) for image in images if image is not None]
                    for subject in subjects:
                        _measure(report, arguments.runs, bench, subject, link)
        finally:
            client.end()
    _pack_figures(report, subjects)
    report.finish()


def _checked_tools(arguments: argparse.Namespace) -> Path:
    if os.geteuid() != 0:
        raise skip("mounting and shaping need root")
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no corpus tools (--tools or IMGSNAP_CORPUS_TOOLS)")
    return Path(arguments.tools).resolve()


def _measure(report: Report, runs: int, bench: "_Bench", subject: Subject, link: Link) -> None:
    name = f"{subject.image.name}, {link.label}"
    report.interleave(
        runs, {f"{name}, {kind}": partial(bench.start, subject, how) for kind, how in KINDS.items()}
    )
    report.interleave(
        1,
        {
            f"{name}, {kind}, trips": partial(bench.trips, subject, how)
            for kind, how in KINDS.items()
        },
    )
    limit = link.seconds(subject.pack["size"], TRIPS_MAX) + subject.local_s
    for kind, how in KINDS.items():
        label = f"{name}, {kind}"
        aim = AIM_READY if how.pack is None else None
        report.figure(
            f"{label}: ready", report.median(label, "ready_s"), "s", "the limit", limit, aim
        )
        report.figure(f"{label}: bytes", report.median(label, "bytes"), "B", "", None)
        report.figure(f"{label}: requests", report.median(label, "requests"), "", "", None)
        trips = f"{label}, trips"
        report.figure(
            f"{label}: sequential trips", report.median(trips, "sequential"), "", "", None
        )
        report.figure(f"{label}: blob GETs", report.median(trips, "blobs"), "", "", None)


def _pack_figures(report: Report, subjects: list[Subject]) -> None:
    for subject in subjects:
        pack = subject.pack
        report.figure(
            f"{subject.image.name}: pack with its table",
            pack["size"],
            "B",
            "its blocks alone, compressed",
            pack["size"] - pack["tableSize"],
            AIM_BYTES,
        )
        report.note(
            f"{subject.image.name}: {pack['blocks']} blocks; {subject.local_s * 1000:.0f} ms local"
        )


class _Bench:
    def __init__(self, client: Client, registry: ShapedRegistry, tools: Path, work: Path) -> None:
        self._client = client
        self._registry = registry
        self._tools = tools
        self._work = work
        self._target = work / "root"

    def prepare(self, image: Image) -> Subject:
        """Publishes image, snapshot and boot pack past the link; times the start from a file."""
        tell(f"boot: publishing {image.name}")
        client, door = self._client, self._registry.door
        source = push(image, door)
        reference = f"{door}/{image.name}-snapshot:perf"
        _, converted = client.convert(source, reference, "--plain-http")
        trace = self._work / f"{image.name}.json"
        # Once for everything that only a first start writes or compiles, and once to be recorded.
        command = client.command("trace", "--plain-http", reference, "-o", trace)
        self._task(image, "--exec", *map(str, command))
        pack = json.loads(
            output_of(
                client.command(
                    "optimize", "--plain-http", reference, "--trace", trace, "--format", "json"
                )
            )
        )
        plain = self._work / f"{image.name}.erofs"
        places = (client.store, client.cache, client.run_dir)
        probe("materialise_probe", *places, reference, plain)
        with erofs(plain, self._work / "plain"):
            starts = [self._task(image, str(self._work / "plain"))["ready_s"] for _ in range(4)]
        plain.unlink()
        return Subject(image, converted["digest"], pack, sorted(starts[1:])[1])

    def start(self, subject: Subject, how: How) -> Sample:
        """A cold start."""
        self._cold()
        with node_daemon(self._client):
            usage, task, counts = self._mounted(subject, how, self._registry.address)
        return {
            "ready_s": usage + task["ready_s"],
            "mount_s": usage,
            "bytes": counts["wire_bytes_down"],
            "requests": counts["requests"],
            "task": task,
            "counts": counts,
        }

    def trips(self, subject: Subject, how: How) -> Sample:
        """The same through a proxy that tells what waited for what."""
        port = int(self._registry.address.rpartition(":")[2])
        with Recorder(port) as recorder:
            self._cold()
            with node_daemon(self._client):
                self._mounted(subject, how, f"127.0.0.1:{recorder.port}")
            counts = recorder.counts()
            lines = [exchange.line for exchange in recorder.exchanges]
        packs = sum("/blobs/" in line for line in lines)
        return {**counts, "blobs": packs, "lines": lines}

    def _mounted(
        self, subject: Subject, how: How, address: str
    ) -> tuple[float, dict[str, Any], dict[str, Any]]:
        named = f"@{subject.digest}" if how.by_digest else ":perf"
        reference = f"{address}/{subject.image.name}-snapshot{named}"
        with mounted_by_daemon(self._client, reference, self._target, how.pack) as mount_s:
            task = self._task(subject.image, str(self._target))
            return mount_s, task, self._registry.counts()

    def _cold(self) -> None:
        """An empty node cache; the daemon is new, since its server has open what is deleted."""
        shutil.rmtree(self._client.cache, ignore_errors=True)
        heat(self._work / "storage")
        self._registry.reset()

    def _task(self, image: Image, *arguments: str) -> dict[str, Any]:
        script = str(self._tools / "start-image")
        result: dict[str, Any] = json.loads(
            output_of([sys.executable, script, image.name, *arguments]).splitlines()[-1]
        )
        return result


if __name__ == "__main__":
    main()
