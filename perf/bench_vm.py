"""The image's own share of a microVM's boot.

The time from attaching a snapshot to the first output of a command in the guest, with the snapshot
remote and nothing cached, minus the same boot with the image as a plain local file: what remote and
lazy cost, whatever kernel, machine and emulator cost. Interleaved rounds of

    local        the device as a plain file, warm in the page cache
    no pack      from the registry behind the link, no boot pack
    pack         the same with a boot pack made of a recorded boot
    cached       once more after that: all that is read is in the node cache

`ready` is the mounted root, `output` the first byte that the command printed. No kernel reads the
disk before its init is up, so how long that takes is left out of the share: it is the attach, and
what comes after the kernel. (A boot pack streams on meanwhile: an emulated kernel gives it seconds,
one under KVM some tenths. The samples have all times.) The daemon runs before the clock starts;
requests and bytes are counted behind the link, sequential trips in boots of their own. QEMU and the
guest's kernel are those of scripts/guest-kit. Needs root, and the tools of the corpus.
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.daemon import node_daemon
from harness.guests import KIT, prepare_kit
from harness.images import Image, image_or_demo
from harness.options import parser, skip, work_directory
from harness.processes import compile_bytecode, heat, output_of, probe
from harness.product import open_places
from harness.recorder import Recorder
from harness.registry import push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

from imgsnap.mount.container import Command, Identity
from imgsnap.mount.process import ProcessId
from imgsnap.node import client as node_client
from imgsnap.vm import run as vm
from imgsnap_cli.places import boot_pack_names, reading

IMAGE = "python-slim"
PROGRAM = ("python3", "-c", "import json; print('up')")
PATH = "PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
AIM_PACK_S = 1.0
AIM_CACHED_S = 0.1
AIM_ATTACH_S = 0.15
TRIPS_MAX = 3


@dataclass(frozen=True, slots=True)
class Subject:
    """A published image with a boot pack, and its device as a plain file."""

    image: Image
    reference: str
    plain: Path
    pack: dict[str, Any]  # what `imgsnap optimize` said


def main() -> None:
    found = parser(__doc__, runs=5)
    found.add_argument("--image", default=IMAGE, help=f"of the corpus [{IMAGE}]")
    found.add_argument("--rate", default="100mbit")
    found.add_argument("--rtt", default="10ms")
    found.add_argument("--memory", type=int, default=512, help="MiB [512]")
    found.add_argument("--emulate", action="store_true", help="even where KVM works")
    arguments = found.parse_args()
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no --tools with shaped-registry")
    if os.geteuid() != 0:
        raise skip("needs root")
    prepare_kit()
    compile_bytecode()
    report = Report("vm", vars(arguments))
    with work_directory(arguments) as work:
        client = Client(work / "client")
        client.root.mkdir()
        storage = work / "storage"
        link = (Path(arguments.tools), storage, arguments.rate, arguments.rtt)
        with shaped_registry(*link) as registry:
            bench = _Bench(client, registry, work, arguments)
            subject = bench.prepare(image_or_demo(arguments.corpus, arguments.image))
            report.interleave(
                arguments.runs,
                {
                    "local": lambda: bench.local(subject),
                    "no pack": lambda: bench.cold(subject, "none"),
                    "pack": lambda: bench.cold(subject, None),
                    "cached": lambda: bench.cached(subject),
                },
            )
            report.interleave(
                arguments.runs,
                {
                    "no pack, trips": lambda: bench.trips(subject, "none"),
                    "pack, trips": lambda: bench.trips(subject, None),
                },
            )
    _figures(report, subject)
    report.finish()


def _figures(report: Report, subject: Subject) -> None:
    report.figure("local file: kernel up", report.median("local", "started"), "s", "", None)
    for mark in ("ready", "output"):
        local = report.median("local", f"{mark}_own")
        report.figure(f"local file: {mark} after the kernel", local, "s", "", None)
        for kind, aim in (("no pack", None), ("pack", AIM_PACK_S), ("cached", AIM_CACHED_S)):
            share = report.median(kind, f"{mark}_own") - local
            report.figure(f"{kind}: share of the image to {mark}", share, "s", "aim", aim)
    for kind in ("no pack", "pack", "cached"):
        attach = report.median(kind, "attached")
        report.figure(f"{kind}: attach", attach, "s", "aim", AIM_ATTACH_S)
        report.figure(f"{kind}: bytes", report.median(kind, "bytes"), "B", "", None)
        report.figure(f"{kind}: requests", report.median(kind, "requests"), "", "", None)
        report.figure(
            f"{kind}: reads of the device", report.median(kind, "device_reads"), "", "", None
        )
    for kind, aim in (("no pack", None), ("pack", TRIPS_MAX)):
        trips = report.median(f"{kind}, trips", "sequential")
        report.figure(f"{kind}: sequential trips", trips, "", "aim", aim)
    report.note(f"{subject.image.name}: the pack has {subject.pack['blocks']} blocks")
    accelerators = {sample["accelerator"] for sample in report.samples["local"]}
    report.note(f"guests ran under {', '.join(sorted(accelerators))}")


class _Bench:
    def __init__(
        self, client: Client, registry: ShapedRegistry, work: Path, arguments: argparse.Namespace
    ) -> None:
        self._client = client
        self._registry = registry
        self._work = work
        self._wanted = vm.Wanted(
            memory_mib=arguments.memory,
            kernel=KIT / "vmlinuz",
            modules=KIT / "modules",
            emulate=arguments.emulate,
        )
        self._state = work / "state"
        self._tools = vm.prepare(self._wanted, self._state, tell)
        self._command = Command(PROGRAM, (PATH,), "/", Identity(), terminal=False)

    def prepare(self, image: Image) -> Subject:
        """Publishes image, snapshot and boot pack past the link."""
        tell(f"vm: publishing {image.name}")
        client, door = self._client, self._registry.door
        source = push(image, door)
        reference = f"{door}/{image.name}-snapshot:perf"
        client.convert(source, reference, "--plain-http")
        optimize = ["optimize", "--plain-http", reference, "--format", "json"]
        optimize += ["--trace", self._record(reference)]
        pack = json.loads(output_of(client.command(*optimize)))
        plain = self._work / "plain.erofs"
        probe("materialise_probe", client.store, client.cache, client.run_dir, reference, plain)
        behind = f"{self._registry.address}/{image.name}-snapshot:perf"
        return Subject(image, behind, plain, pack)

    def _record(self, reference: str) -> Path:
        """The trace of a boot."""
        trace = self._work / "boot.json"
        attaching = self._attached(reference, "none", vm.TimeLine())
        with node_daemon(self._client), attaching as attached:
            self._boot(Path(attached["path"]), vm.TimeLine())
            # Whether KVM works is known only now.
            self._tools = vm.prepare(self._wanted, self._state, tell)
            found = node_client.trace_of_attachment(attached["id"], self._client.run_dir)
        trace.write_text(found)
        return trace

    def local(self, subject: Subject) -> Sample:
        heat(subject.plain)
        line = vm.TimeLine()
        return self._boot(subject.plain, line)

    def cold(self, subject: Subject, pack: str | None) -> Sample:
        """Nothing of the image on this machine; the daemon is new."""
        shutil.rmtree(self._client.cache, ignore_errors=True)
        heat(self._work / "storage")
        return self._remote(subject, pack)

    def cached(self, subject: Subject) -> Sample:
        """After `cold` in the same round: what that fetched is in the node cache, its page cache
        is not."""
        return self._remote(subject, None)

    def _remote(self, subject: Subject, pack: str | None) -> Sample:
        with node_daemon(self._client):
            self._registry.reset()
            line = vm.TimeLine()
            with self._attached(subject.reference, pack, line) as attached:
                sample = self._boot(Path(attached["path"]), line)
                reads = node_client.statistics_of_attachment(attached["id"], self._client.run_dir)
            counts = self._registry.counts()
        sizes = {"bytes": counts["wire_bytes_down"], "requests": counts["requests"]}
        return {**sample, **sizes, "reads": reads, "device_reads": reads["hits"] + reads["misses"]}

    def trips(self, subject: Subject, pack: str | None) -> Sample:
        """A cold boot through a proxy that tells what waited for what."""
        address, port = self._registry.address, int(self._registry.address.rpartition(":")[2])
        with Recorder(port) as recorder:
            behind = subject.reference.replace(address, f"127.0.0.1:{recorder.port}")
            self.cold(replace(subject, reference=behind), pack)
            lines = [exchange.line for exchange in recorder.exchanges]
            return {**recorder.counts(), "lines": lines}

    @contextmanager
    def _attached(
        self, reference: str, pack: str | None, line: vm.TimeLine
    ) -> Iterator[dict[str, Any]]:
        client, me = self._client, ProcessId.of(os.getpid())
        places, settings = open_places(str(client.store), str(client.cache), str(client.run_dir))
        read = reading(boot_pack_names(pack), "pack" if pack is None else "off")
        line.begin()
        try:
            attached = places.attach(reference, None, read, process=me)
            line.mark("attached")
            yield attached
        finally:
            node_client.release(settings.run, me)

    def _boot(self, disk: Path, line: vm.TimeLine) -> Sample:
        said = bytearray()
        status = vm.run(
            self._tools,
            self._wanted,
            disk,
            None,
            self._command,
            self._state,
            tell,
            line,
            said.extend,
        )
        if status:
            raise SystemExit(f"error: the guest's command failed: {said.decode(errors='replace')}")
        times = line.seconds
        attached = times.setdefault("attached", 0.0)
        own = {
            f"{mark}_own": attached + times[mark] - times["started"] for mark in ("ready", "output")
        }
        return {**times, **own, "accelerator": self._tools.accelerator.value}


if __name__ == "__main__":
    main()
