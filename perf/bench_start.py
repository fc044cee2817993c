"""Time until a program is ready, nothing cached, over a slow link: from a snapshot, beside pulling.

For each image and round, one after the other:

  mount   `imgsnap mount` from the empty cache, then the start task in the mounted root by the
          corpus's start-image; the time is that of both
  run     `imgsnap run`, which mounts and starts a runc container, by start-image --exec
  pull    `ctr images pull` into a private containerd, then the start task by `ctr run`

`run` and `pull` do the same work: get the image, make a container, run its command. `mount` leaves
out the container. Bytes and requests are counted by the registry, until the task is ready or, if
it ends by itself, has ended. Page caches of the machine are dropped before each sample. Needs
root, the corpus and its tools.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.containerd import Containerd, containerd
from harness.images import Image, corpus_image
from harness.options import parser, skip, work_directory
from harness.processes import (
    compile_bytecode,
    cpu_seconds,
    drop_page_caches,
    heat,
    memory,
    output_of,
)
from harness.registry import push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

IMAGES = ("nginx", "python-app", "python-sci", "node", "gcc")
LIMIT_RSS = 64 << 20
METHODS = ("mount", "run", "pull")


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument("--images", nargs="+", metavar="NAME", default=list(IMAGES))
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    found.add_argument("--rate", default="100mbit", help="of the link, or none [100mbit]")
    found.add_argument("--rtt", default="10ms", help="round trip [10ms]")
    found.add_argument(
        "--chunk-size", nargs="+", default=["256KiB"], help="one snapshot each [256KiB]"
    )
    found.add_argument("--keep-page-caches", action="store_true", help="the node is not cold")
    arguments = found.parse_args()
    tools = _checked_tools(arguments)
    images = _images(arguments)
    report = Report("start", vars(arguments))
    compile_bytecode()
    with (
        work_directory(arguments) as work,
        shaped_registry(tools, work / "storage", arguments.rate, arguments.rtt) as registry,
        _rival(work, arguments.methods) as rival,
    ):
        client = Client(work / "client")
        client.root.mkdir()
        bench = _Bench(client, registry, rival, tools, work)
        bench.cold = not arguments.keep_page_caches
        try:
            for image in images:
                bench.publish(image, arguments.chunk_size)
            for image in images:  # image by image: the short ones first are done soonest
                steps = bench.steps(image, arguments.methods, arguments.chunk_size)
                report.interleave(arguments.runs, steps)
                _figures(report, arguments, image)
        finally:
            client.end()
        if arguments.keep_page_caches:
            report.note("page caches were kept")
        elif bench.cold:
            report.note("page caches were dropped before each sample")
        else:
            report.note("page caches could NOT be dropped: these starts are not cold")
    report.note(f"link: {arguments.rate}, round trip {arguments.rtt}")
    report.finish()


def _checked_tools(arguments: argparse.Namespace) -> Path:
    if os.geteuid() != 0:
        raise skip("mounting and shaping need root")
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no corpus tools (--tools or IMGSNAP_CORPUS_TOOLS); `make demo` is similar")
    return Path(arguments.tools).resolve()


def _images(arguments: argparse.Namespace) -> list[Image]:
    found = [corpus_image(arguments.corpus, name) for name in arguments.images]
    images = [image for image in found if image is not None]
    if len(images) < len(found):
        have = {image.name for image in images}
        missing = ", ".join(name for name in arguments.images if name not in have)
        tell(f"start: not in {arguments.corpus}: {missing}")
    if not images:
        raise skip(f"no image in {arguments.corpus}; `make demo` is similar")
    return images


@contextlib.contextmanager
def _rival(work: Path, methods: list[str]) -> Iterator[Containerd | None]:
    if "pull" not in methods:
        yield None
        return
    with containerd(work / "containerd") as server:
        yield server


class _Bench:
    def __init__(
        self,
        client: Client,
        registry: ShapedRegistry,
        rival: Containerd | None,
        tools: Path,
        work: Path,
    ) -> None:
        self._client = client
        self._registry = registry
        self._rival = rival
        self._tools = tools
        self._target = work / "root"
        self._storage = work / "storage"
        self.cold = True

    def publish(self, image: Image, chunk_sizes: list[str]) -> None:
        """The image and its snapshots into the registry, past the link."""
        tell(f"start: publishing {image.name}")
        source = push(image, self._registry.door)
        for chunk_size in chunk_sizes:
            # A repository for each size: chunks of one would otherwise be found in the other.
            target = f"{self._registry.door}/{self._repository(image, chunk_size)}:perf"
            self._client.convert(source, target, "--plain-http", "--chunk-size", chunk_size)

    def steps(
        self, image: Image, methods: list[str], chunk_sizes: list[str]
    ) -> dict[str, Callable[[], Sample]]:
        steps: dict[str, Callable[[], Sample]] = {}
        for chunk_size in chunk_sizes:
            if "mount" in methods:
                steps[label(image, "mount", chunk_size)] = partial(self._mount, image, chunk_size)
            if "run" in methods:
                steps[label(image, "run", chunk_size)] = partial(self._run, image, chunk_size)
        if "pull" in methods:
            steps[label(image, "pull", "")] = partial(self._pull, image)
        return steps

    def _mount(self, image: Image, chunk_size: str) -> Sample:
        self._cold()
        reference = self._reference(image, chunk_size)
        with self._client.mounted(reference, self._target, "--plain-http") as usage:
            task = self._start(image, str(self._target))
            counts = self._registry.counts()
            server = self._client.server_pid(self._target)
            cpu = usage.cpu_s + cpu_seconds(server)
            return _sample(usage.wall_s, task, counts) | {"cpu_s": cpu, **memory(server)}

    def _run(self, image: Image, chunk_size: str) -> Sample:
        self._cold()
        reference = self._reference(image, chunk_size)
        command = self._client.command("run", "--plain-http", reference)
        task = self._start(image, "--exec", *map(str, command))
        return _sample(0.0, task, self._registry.counts())

    def _pull(self, image: Image) -> Sample:
        assert self._rival is not None
        reference = f"{self._registry.address}/{image.name}:latest"
        container = f"perf-{os.getpid()}"
        self._cold()
        try:
            before = cpu_seconds(self._rival.pid)
            usage = self._rival.pull(reference)
            cpu = usage.cpu_s + cpu_seconds(self._rival.pid) - before
            task = self._start(image, "--exec", *self._rival.run_command(reference, container))
            return _sample(usage.wall_s, task, self._registry.counts()) | {"cpu_s": cpu}
        finally:
            self._rival.remove_container(container)
            self._rival.forget(reference)

    def _cold(self) -> None:
        shutil.rmtree(self._client.cache, ignore_errors=True)
        if self.cold:
            self.cold = drop_page_caches()
            heat(self._storage)
        self._registry.reset()

    def _start(self, image: Image, *arguments: str) -> dict[str, Any]:
        script = str(self._tools / "start-image")
        result: dict[str, Any] = json.loads(
            output_of([sys.executable, script, image.name, *arguments]).splitlines()[-1]
        )
        return result

    def _repository(self, image: Image, chunk_size: str) -> str:
        return f"{image.name}-{chunk_size.lower()}"

    def _reference(self, image: Image, chunk_size: str) -> str:
        return f"{self._registry.address}/{self._repository(image, chunk_size)}:perf"


def label(image: Image, method: str, chunk_size: str) -> str:
    return f"{image.name}, {method}" + (f", chunks {chunk_size}" if chunk_size else "")


def _sample(first_s: float, task: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """`first_s` is what came before the task: the mount, or the pull."""
    return {
        "ready_s": first_s + task["ready_s"],
        "first_s": first_s,
        "task_s": task["ready_s"],
        "bytes": counts["wire_bytes_down"],
        "requests": counts["requests"],
        "counts": counts,
        "task": task,
    }


def _figures(report: Report, arguments: argparse.Namespace, image: Image) -> None:
    rival = label(image, "pull", "") if "pull" in arguments.methods else None
    for chunk_size in arguments.chunk_size:
        for method in ("mount", "run"):
            if method not in arguments.methods:
                continue
            ours = label(image, method, chunk_size)
            for key, unit in (("ready_s", "s"), ("bytes", "B"), ("requests", "")):
                name = key.removesuffix("_s")
                other = report.median(rival, key) if rival else None
                against = "ctr images pull + ctr run" if rival else ""
                report.figure(f"{ours}: {name}", report.median(ours, key), unit, against, other)
            if method == "mount":
                first = report.median(ours, "first_s")
                other = report.median(rival, "first_s") if rival else None
                against = "the pull alone" if rival else ""
                report.figure(f"{ours}: of which mount", first, "s", against, other)
                against = "ctr's and containerd's for the pull" if rival else ""
                other = report.median(rival, "cpu_s") if rival else None
                cpu = report.median(ours, "cpu_s")
                report.figure(f"{ours}: CPU of imgsnap", cpu, "s", against, other)
                rss = report.median(ours, "VmHWM")
                report.figure(f"{ours}: server peak RSS", rss, "B", "limit", LIMIT_RSS, 1.0)


if __name__ == "__main__":
    main()
