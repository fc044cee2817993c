"""Mounting a remote snapshot from a real registry on loopback: time, round trips, requests, bytes.

Cases: nothing cached, or the node has the snapshot's metadata (it was mounted before); named by
tag or by digest. Each is measured as users start it (`imgsnap mount`, the whole process, until the
root can be listed) and as the `mount_snapshot` call alone, in a fresh interpreter that has
imported everything: the difference is Python's start.

GETs and bytes are counted by the registry's access log. Sequential round trips are counted in runs
of their own, through a proxy and a link of --rtt: the longest chain of requests of which each was
sent after the answer before it had ended. As a check that does not depend on that rule, the time
that the link adds is given in round trips; that counts the TCP handshake of connections too.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.client import Client
from harness.images import image_or_demo
from harness.options import parser, work_directory
from harness.processes import Usage, compile_bytecode, measured, probe
from harness.recorder import Recorder
from harness.registry import Registry, docker_registry, push
from harness.report import Report, Sample

LIMIT_COLD_S = 0.150
LIMIT_WARM_S = 0.050
LIMIT_ROUND_TRIPS = 4
TAG = "perf"


@dataclass(frozen=True, slots=True)
class Case:
    """What the node has, and how the snapshot is named."""

    label: str
    cached: bool
    by_digest: bool


CASES = (
    Case("nothing cached, by tag", cached=False, by_digest=False),
    Case("nothing cached, by digest", cached=False, by_digest=True),
    Case("metadata cached, by tag", cached=True, by_digest=False),
    Case("metadata cached, by digest", cached=True, by_digest=True),
)


def main() -> None:
    found = parser(__doc__, runs=9)
    found.add_argument("--image", default="python-sci", help="of the corpus [python-sci]")
    found.add_argument("--rtt", type=float, default=50.0, help="ms, where trips are counted [50]")
    arguments = found.parse_args()
    report = Report("mount", vars(arguments))
    image = image_or_demo(arguments.corpus, arguments.image)
    report.note(f"image: {image.name}")
    compile_bytecode()
    with work_directory(arguments) as work, docker_registry(work) as registry:
        client = Client(work / "client")
        client.root.mkdir()
        source = push(image, registry.address)
        _, converted = client.convert(
            source, f"{registry.address}/{image.name}:{TAG}", "--plain-http"
        )
        bench = _Bench(client, registry, image.name, converted["digest"], work / "root")
        try:
            report.interleave(arguments.runs, bench.steps())
            report.interleave(max(1, arguments.runs // 3), bench.counting_steps(arguments.rtt))
        finally:
            client.end()
    _figures(report, arguments)
    report.finish()


class _Bench:
    def __init__(
        self, client: Client, registry: Registry, name: str, digest: str, target: Path
    ) -> None:
        self._client = client
        self._registry = registry
        self._name = name
        self._digest = digest
        self._target = target

    def steps(self) -> dict[str, Callable[[], Sample]]:
        steps: dict[str, Callable[[], Sample]] = {}
        for case in CASES:
            steps[f"imgsnap mount: {case.label}"] = partial(self._command, case)
            steps[f"mount_snapshot: {case.label}"] = partial(self._call, case)
        steps["python -c pass"] = lambda: measured([sys.executable, "-c", "pass"]).as_dict()
        steps["imgsnap --help"] = lambda: self._client.run("--help").as_dict()
        return steps

    def counting_steps(self, rtt_ms: float) -> dict[str, Callable[[], Sample]]:
        return {f"trips: {case.label}": partial(self._trips, case, rtt_ms) for case in CASES}

    def _command(self, case: Case) -> Sample:
        self._prepare(case, self._registry.address)
        mark = self._registry.mark()
        usage = self._mount(self._reference(case, self._registry.address))
        return usage.as_dict() | self._registry.since(mark)

    def _mount(self, reference: str) -> Usage:
        """A shell mounts and lists, so that the listing is in the time."""
        command = self._client.command("mount", reference, self._target, "--plain-http")
        script = 'target=$1; shift; "$@" && ls "$target" >/dev/null'
        try:
            return measured(["sh", "-c", script, "sh", self._target, *command])
        finally:
            if self._target.exists():
                self._client.umount(self._target)

    def _call(self, case: Case) -> Sample:
        self._prepare(case, self._registry.address)
        return {"wall_s": self._call_once(self._reference(case, self._registry.address))}

    def _call_once(self, reference: str) -> float:
        places = (self._client.store, self._client.cache, self._client.run_dir)
        return float(json.loads(probe("mount_probe", *places, reference, self._target))["wall_s"])

    def _trips(self, case: Case, rtt_ms: float) -> Sample:
        """Counts, and the mount's time with and without the link's round-trip time."""
        walls = {}
        counts: dict[str, int] = {}
        for key, rtt_s in (("near_s", 0.0), ("far_s", rtt_ms / 1000)):
            with self._link(rtt_s) as recorder:
                address = f"127.0.0.1:{recorder.port}"
                self._prepare(case, address)
                recorder.reset()
                walls[key] = self._call_once(self._reference(case, address))
                counts = recorder.counts()
                lines = [exchange.line for exchange in recorder.exchanges]
        added = (walls["far_s"] - walls["near_s"]) / (rtt_ms / 1000)
        return {**walls, **counts, "added_trips": added, "lines": lines}

    @contextmanager
    def _link(self, rtt_s: float) -> Iterator[Recorder]:
        from demo.link import Link

        with Link(self._registry.port, 0.0, rtt_s) as link, Recorder(link.port) as recorder:
            yield recorder

    def _prepare(self, case: Case, address: str) -> None:
        """An empty cache, or one that a mount and unmount have filled."""
        shutil.rmtree(self._client.cache, ignore_errors=True)
        if case.cached:
            with self._client.mounted(self._reference(case, address), self._target, "--plain-http"):
                pass

    def _reference(self, case: Case, address: str) -> str:
        name = f"{address}/{self._name}"
        return f"{name}@{self._digest}" if case.by_digest else f"{name}:{TAG}"


def _figures(report: Report, arguments: argparse.Namespace) -> None:
    for case in CASES:
        limit = LIMIT_WARM_S if case.cached else LIMIT_COLD_S
        for how in ("imgsnap mount", "mount_snapshot"):
            label = f"{how}: {case.label}"
            report.figure(label, report.median(label, "wall_s"), "s", "limit", limit, 1.0)
    for case in CASES:
        label = f"trips: {case.label}"
        limit, against = LIMIT_ROUND_TRIPS, "limit"
        report.figure(
            f"sequential {label}", report.median(label, "sequential"), "", against, limit, 1.0
        )
        added = report.median(label, "added_trips")
        report.figure(f"added time in {label}", added, "", against, limit)
        command = f"imgsnap mount: {case.label}"
        report.figure(f"GETs: {case.label}", report.median(command, "gets"), "", "", None)
        report.figure(f"bytes: {case.label}", report.median(command, "body_bytes"), "B", "", None)
    start = report.median("python -c pass", "wall_s")
    report.figure(
        "imgsnap --help", report.median("imgsnap --help", "wall_s"), "s", "python -c pass", start
    )
    report.note(f"trips were counted over {arguments.rtt:g} ms; added time includes handshakes")


if __name__ == "__main__":
    main()
