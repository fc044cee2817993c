"""A reader that wants a share of an image's files: lazily, adaptively, and after all was fetched.

For each share and round, one after the other, nothing cached, page caches dropped:

  lazy      `imgsnap mount --prefetch off`, then the files
  adaptive  `imgsnap mount`, as it is without options
  all       `imgsnap warm`, then mount and the files

The time is that of the mount (and the warm) and of the reads. Adaptive should never be slower than
1.1 times the better of the two others. Needs root, the corpus and its tools.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.images import corpus_image
from harness.options import parser, skip, work_directory
from harness.processes import compile_bytecode, drop_page_caches, heat, probe
from harness.registry import push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

SHARES = (1, 5, 10, 30, 60, 100)
AIM = 1.1
METHODS = ("lazy", "adaptive", "all")


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument("--image", default="python-sci", help="of the corpus [python-sci]")
    found.add_argument("--shares", nargs="+", type=int, default=list(SHARES), help="in percent")
    found.add_argument("--rate", default="100mbit", help="of the link [100mbit]")
    found.add_argument("--rtt", default="10ms", help="round trip [10ms]")
    arguments = found.parse_args()
    if os.geteuid() != 0:
        raise skip("mounting and shaping need root")
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no corpus tools (--tools or IMGSNAP_CORPUS_TOOLS)")
    image = corpus_image(arguments.corpus, arguments.image)
    if image is None:
        raise skip(f"no {arguments.image} in {arguments.corpus}")
    report = Report("touch", vars(arguments))
    compile_bytecode()
    tools = Path(arguments.tools)
    with (
        work_directory(arguments) as work,
        shaped_registry(tools, work / "storage", arguments.rate, arguments.rtt) as registry,
    ):
        client = Client(work / "client")
        client.root.mkdir()
        tell(f"touch: publishing {image.name}")
        source = push(image, registry.door)
        client.convert(source, f"{registry.door}/{image.name}:perf", "--plain-http")
        bench = _Bench(client, registry, f"{registry.address}/{image.name}:perf", work)
        try:
            for share in arguments.shares:
                steps = {
                    f"{share} %, {method}": partial(bench.sample, method, share / 100)
                    for method in METHODS
                }
                report.interleave(arguments.runs, steps)
                _figures(report, share)
        finally:
            client.end()
    report.note(f"link: {arguments.rate}, round trip {arguments.rtt}")
    report.finish()


class _Bench:
    def __init__(
        self, client: Client, registry: ShapedRegistry, reference: str, work: Path
    ) -> None:
        self._client = client
        self._registry = registry
        self._reference = reference
        self._work = work

    def sample(self, method: str, share: float) -> Sample:
        shutil.rmtree(self._client.cache, ignore_errors=True)
        drop_page_caches()
        heat(self._work / "storage")
        self._registry.reset()
        first_s = 0.0
        if method == "all":
            first_s = self._client.run("warm", "--plain-http", self._reference).wall_s
        options = ["--plain-http", *(("--prefetch", "off") if method == "lazy" else ())]
        target = self._work / "root"
        with self._client.mounted(self._reference, target, *options) as usage:
            found: dict[str, Any] = json.loads(probe("touch_probe", target, str(share)))
            counts = self._registry.counts()
        return {
            "total_s": first_s + usage.wall_s + found["seconds"],
            "bytes": counts["wire_bytes_down"],
            "requests": counts["requests"],
            "read": found,
        }


def _figures(report: Report, share: int) -> None:
    lazy, adaptive, everything = (f"{share} %, {method}" for method in METHODS)
    best = min(report.median(lazy, "total_s"), report.median(everything, "total_s"))
    ours = report.median(adaptive, "total_s")
    report.figure(f"{share} % of the bytes", ours, "s", "the better of lazy and all", best, AIM)
    for name, label in (("lazy", lazy), ("all", everything)):
        report.figure(f"{share} %, {name}", report.median(label, "total_s"), "s", "", None)
    for key, unit in (("bytes", "B"), ("requests", "")):
        other = report.median(lazy, key)
        report.figure(f"{share} %, {key}", report.median(adaptive, key), unit, "lazy", other)


if __name__ == "__main__":
    main()
