"""How fast a snapshot comes over links of several kinds, beside the link and a plain download.

For each link and round, one after the other, nothing cached:

  warm      `imgsnap warm`: every chunk fetched, verified and stored
  read      one sequential read of the whole device through FUSE, readahead as it is
  idle      single reads of 4 KiB whose chunk has to be fetched, one after the other
  busy      the same while everything is being prefetched
  download  ranges of the same packs by a plain client on many connections, bytes thrown away

Rates are of packs' bytes (what the registry stores), so that all three are the same work for the
link. A plain download is the limit that this machine sets: registry, link and client share its
cores. Needs root, the corpus and its tools.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.images import Image, corpus_image, large_file_image
from harness.options import parser, skip, work_directory
from harness.processes import compile_bytecode, cpu_seconds, heat, measured, output_of, probe
from harness.registry import push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

LINKS = ("100mbit/10ms", "1gbit/2ms", "25mbit/30ms", "1gbit/200ms")
AIM = 0.7
DOWNLOADS = (16, 4 << 20)
"""Connections and bytes per range of the plain download."""
READS = 60
WIRE_PER_BYTE = 1.045  # Ethernet, IP and TCP headers, as the shaping counts them


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument("--image", default="python-sci", help="of the corpus, or large [python-sci]")
    found.add_argument("--mib", type=int, default=384, help="size of `--image large` [384]")
    found.add_argument("--links", nargs="+", metavar="RATE/RTT", default=list(LINKS))
    arguments = found.parse_args()
    if os.geteuid() != 0:
        raise skip("mounting and shaping need root")
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no corpus tools (--tools or IMGSNAP_CORPUS_TOOLS)")
    report = Report("fetch", vars(arguments))
    compile_bytecode()
    with work_directory(arguments) as work:
        client = Client(work / "client")
        client.root.mkdir()
        image = _image(arguments, work)
        try:
            for number, link in enumerate(arguments.links):
                _measure(report, arguments, client, work, image, link, publish=number == 0)
        finally:
            client.end()
    report.finish()


def _image(arguments: argparse.Namespace, work: Path) -> Image:
    """`large` is one file that does not compress: long enough that the start does not count."""
    if arguments.image == "large":
        return large_file_image(work / "large", arguments.mib)
    image = corpus_image(arguments.corpus, arguments.image)
    if image is None:
        raise skip(f"no {arguments.image} in {arguments.corpus}")
    return image


def _measure(
    report: Report,
    arguments: argparse.Namespace,
    client: Client,
    work: Path,
    image: Image,
    link: str,
    *,
    publish: bool,
) -> None:
    rate, _, rtt = link.partition("/")
    with shaped_registry(Path(arguments.tools), work / "storage", rate, rtt) as registry:
        if publish:
            tell(f"fetch: publishing {image.name}")
            source = push(image, registry.door)
            client.convert(source, f"{registry.door}/{image.name}:perf", "--plain-http")
        bench = _Bench(client, registry, image, work)
        steps: dict[str, Callable[[], Sample]] = {
            f"{link}, warm": partial(bench.warm),
            f"{link}, read": partial(bench.read),
            f"{link}, download": partial(bench.download),
            f"{link}, idle": partial(bench.demand, "idle"),
            f"{link}, busy": partial(bench.demand, "busy"),
        }
        report.interleave(arguments.runs, steps)
    wire = _bits(rate) / 8 / WIRE_PER_BYTE
    plain = report.median(f"{link}, download", "rate")
    report.figure(f"{link}: plain download", plain, "B/s", "the link", wire)
    for key, name in (("p50_s", "median"), ("p99_s", "p99")):
        busy, idle = (report.median(f"{link}, {kind}", key) for kind in ("busy", "idle"))
        report.figure(f"{link}: demand during prefetch, {name}", busy, "s", "idle link", idle)
    for kind in ("warm", "read"):
        ours = report.median(f"{link}, {kind}", "rate")
        report.figure(f"{link}: {kind}", ours, "B/s", "plain download", plain, AIM)
        report.figure(f"{link}: {kind}", ours, "B/s", "the link", wire)
        cpu = report.median(f"{link}, {kind}", "cpu_s")
        report.figure(f"{link}: {kind}, CPU of imgsnap", cpu, "s", "", None)
        requests = report.median(f"{link}, {kind}", "requests")
        report.figure(f"{link}: {kind}, requests", requests, "", "", None)


class _Bench:
    def __init__(self, client: Client, registry: ShapedRegistry, image: Image, work: Path) -> None:
        self._client = client
        self._registry = registry
        self._image = image
        self._work = work
        self._reference = f"{registry.address}/{image.name}:perf"
        manifest = json.loads(
            output_of(
                client.command(
                    "inspect", "--plain-http", "--raw", f"{registry.door}/{image.name}:perf"
                )
            )
        )
        self._packs = [
            (item["digest"], item["size"])
            for item in manifest["layers"]
            if item["mediaType"].endswith(".pack.v1")
        ]
        self._bytes = sum(size for _, size in self._packs)

    def warm(self) -> Sample:
        self._cold()
        command = self._client.command("warm", "--plain-http", self._reference)
        usage = measured(command)
        return self._sample(usage.wall_s, usage.cpu_s)

    def read(self) -> Sample:
        target = self._work / "root"
        self._cold()
        with self._client.mounted(self._reference, target, "--plain-http"):
            server = self._client.server_pid(target)
            before = cpu_seconds(server)
            (device,) = self._client.run_dir.glob("**/layer.erofs")
            usage = measured(["dd", f"if={device}", "of=/dev/null", "bs=1M"])
            return self._sample(usage.wall_s, cpu_seconds(server) - before)

    def download(self) -> Sample:
        self._cold()
        connections, size = DOWNLOADS
        blobs = [f"{digest}:{length}" for digest, length in self._packs]
        repository = self._image.name
        address = self._registry.address
        said = probe("download_probe", address, repository, str(connections), str(size), *blobs)
        return self._sample(float(said), 0.0)

    def demand(self, kind: str) -> Sample:
        self._cold()
        arguments = (self._reference, str(self._client.cache), str(READS), kind)
        value = json.loads(probe("demand_probe", *arguments))
        found = value["latencies_s"] or [0.0]
        return {
            "p50_s": found[len(found) // 2],
            "p99_s": found[len(found) * 99 // 100],
            "reads": len(found),
            **value,
        }

    def _cold(self) -> None:
        shutil.rmtree(self._client.cache, ignore_errors=True)
        heat(self._work / "storage")
        self._registry.reset()

    def _sample(self, seconds: float, cpu_s: float) -> dict[str, Any]:
        counts = self._registry.counts()
        return {
            "seconds": seconds,
            "rate": self._bytes / seconds,
            "cpu_s": cpu_s,
            "requests": counts["requests"],
            "counts": counts,
        }


def _bits(rate: str) -> float:
    match = re.fullmatch(r"([\d.]+)(k|m|g)bit", rate)
    if match is None:
        raise SystemExit(f"error: what is the rate {rate!r}?")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


if __name__ == "__main__":
    main()
