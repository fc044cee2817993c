"""Many microVMs of one image on one node: what is fetched, and what memory is ours.

`--vms` emulated guests of one snapshot, remote and not cached, run a small workload and then stay,
all at once:

* GETs and bytes that the registry answered for the first guest, and for all others together;
* host page cache: of the attached file, which all guests read (one copy, however many they are),
  and of the node cache's files below it;
* memory that is ours: the daemon's processes and each `imgsnap vm run` (Pss), with QEMU's beside;
* the guests' own page cache, with virtio-blk and, in a second round with the snapshot fetched
  whole, mapped into the guests by virtio-pmem and DAX (`vm run --dax`).

Then `--attachments` processes, none of them a VM, have the snapshot attached for themselves, as
VMMs have: time and memory of each, and of the end of all of them.

Counts and memory do not depend on the machine's load; times do. An emulating QEMU keeps translated
code, which is most of its own memory. QEMU and the guest's kernel are those of scripts/guest-kit.
Needs root.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.daemon import node_daemon
from harness.guests import KIT, STAY, Guest, Guests, prepare_kit
from harness.images import image_or_demo
from harness.options import parser, skip, work_directory
from harness.processes import compile_bytecode, drop_page_caches, output_of, proportional_memory
from harness.product import open_places
from harness.registry import Registry, docker_registry, push
from harness.report import Report, Sample, tell

from imgsnap.mount.process import ProcessId
from imgsnap.node import client as node_client
from imgsnap.units import MIB
from imgsnap_cli.places import reading

IMAGE = "python-slim"
WORK = f"set -e; python3 -c 'import json, sqlite3, asyncio'; {STAY}"
OURS_PER_VM = 4 * MIB
"""What we aim at, of the daemon."""
ATTACH_S = 0.05


def main() -> None:
    found = parser(__doc__, runs=1)
    found.add_argument("--image", default=IMAGE, help=f"of the corpus [{IMAGE}]")
    found.add_argument("--vms", type=int, default=20, help="at once, 2 or more [20]")
    found.add_argument("--memory", default="128MiB", help="of each guest [128MiB]")
    found.add_argument("--attachments", type=int, default=500, help="[500]")
    arguments = found.parse_args()
    if arguments.vms < 2 or arguments.attachments < 1:
        found.error("at least two guests and one attachment")
    if os.geteuid() != 0:
        raise skip("needs root")
    if shutil.which("fincore") is None:
        raise skip("fincore is not installed (util-linux)")
    prepare_kit()
    compile_bytecode()
    report = Report("density", vars(arguments))
    with work_directory(arguments) as work:
        client = Client(work / "client")
        client.root.mkdir()
        with docker_registry(work) as registry:
            bench = _Bench(client, registry, work, arguments)
            bench.publish()
            for _ in range(arguments.runs):
                for name, step in bench.steps().items():
                    tell(f"density: {name}")
                    report.samples.setdefault(name, []).append(step())
    _figures(report, arguments)
    report.finish()


def _figures(report: Report, arguments: argparse.Namespace) -> None:
    for name in ("virtio-blk", "pmem + dax"):
        for key, unit in (
            ("guest_cached", "B"),
            ("guest_free", "B"),
            ("qemu", "B"),
            ("run", "B"),
            ("daemon_per_vm", "B"),
            ("file_cached", "B"),
            ("node_cache_cached", "B"),
        ):
            report.figure(f"{name}: {_TEXTS[key]}", report.median(name, key), unit, "", None)
    first = report.median("virtio-blk", "first_gets")
    others = report.median("virtio-blk", "other_blob_gets")
    report.figure("GETs of the first guest", first, "", "", None)
    report.figure(f"GETs of blobs, {arguments.vms - 1} more", others, "", "", None)
    report.figure("bytes, first guest", report.median("virtio-blk", "first_bytes"), "B", "", None)
    report.figure("bytes, the others", report.median("virtio-blk", "other_bytes"), "B", "", None)
    attach = report.median("attachments", "attach")
    report.figure("attach for one more process", attach, "s", "limit", ATTACH_S)
    report.figure("… the slowest", report.median("attachments", "attach_max"), "s", "", None)
    report.figure("… its end", report.median("attachments", "release"), "s", "", None)
    per_attachment = report.median("attachments", "daemon_each")
    report.figure("memory per attachment", per_attachment, "B", "", None)
    requests = report.median("attachments", "requests_each")
    report.figure("requests per attachment", requests, "", "", None)
    blobs = report.median("attachments", "blob_gets")
    report.figure("GETs of blobs, all attachments", blobs, "", "", None)


_TEXTS = {
    "guest_cached": "page cache of a guest",
    "guest_free": "free memory of a guest",
    "qemu": "QEMU, each (Pss)",
    "run": "imgsnap vm run, each (Pss)",
    "daemon_per_vm": "growth of the daemon per guest (Pss)",
    "file_cached": "host page cache of the attached file",
    "node_cache_cached": "host page cache of the node cache",
}


class _Bench:
    def __init__(
        self, client: Client, registry: Registry, work: Path, arguments: argparse.Namespace
    ) -> None:
        self._client = client
        self._registry = registry
        self._work = work
        self._vms: int = arguments.vms
        self._memory: str = arguments.memory
        self._attachments: int = arguments.attachments
        self._image: str = arguments.image
        self._corpus: Path = arguments.corpus
        self._reference = ""

    def publish(self) -> None:
        image = image_or_demo(self._corpus, self._image)
        tell(f"density: publishing {image.name}")
        source = push(image, self._registry.address)
        self._reference = f"{self._registry.address}/{image.name}-snapshot:perf"
        self._client.convert(source, self._reference, "--plain-http")

    def steps(self) -> dict[str, Any]:
        return {
            "virtio-blk": self._cold,
            "pmem + dax": self._mapped,
            "attachments": self._attach_all,
        }

    def _cold(self) -> Sample:
        shutil.rmtree(self._client.cache, ignore_errors=True)
        drop_page_caches()
        with node_daemon(self._client), self._guests() as guests:
            mark = self._registry.mark()
            up = guests.start(1)
            first, mark = self._registry.since(mark), self._registry.mark()
            before = self._daemon()
            up += guests.start(self._vms - 1)
            others = self._registry.since(mark)
            sample = self._measured(up, before, self._vms - 1)
        return {
            **sample,
            "first_gets": first["gets"],
            "first_bytes": first["body_bytes"],
            "other_blob_gets": others["blob_gets"],
            "other_bytes": others["body_bytes"],
        }

    def _mapped(self) -> Sample:
        warm = ("warm", "--plain-http", "--progress", "none")
        output_of(self._client.command(*warm, self._reference))
        drop_page_caches()
        with node_daemon(self._client), self._guests("--dax") as guests:
            up = guests.start(1)
            before = self._daemon()
            up += guests.start(self._vms - 1)
            return self._measured(up, before, self._vms - 1)

    def _guests(self, *options: str) -> Guests:
        kit = ("--emulate", "--kernel", KIT / "vmlinuz", "--modules", KIT / "modules")
        machine = ("--memory", self._memory, "--prefetch", "off", "--boot-pack", "none")
        words = ("vm", "run", "--plain-http", *kit, *machine, *options, self._reference)
        return Guests(self._client.command(*words, "--", "sh", "-c", WORK), self._work)

    def _measured(self, up: list[Guest], before: int, added: int) -> Sample:
        """While all of them live."""
        attached = node_client.daemon_call(self._client.run_dir, "attachments")
        files = [Path(item["path"]) for item in attached]
        return {
            "guests": len(up),
            "attached_files": len(files),
            "users": [item["users"] for item in attached],
            "guest_cached": statistics.median(guest.meminfo["Cached"] for guest in up),
            "guest_free": statistics.median(guest.meminfo["MemFree"] for guest in up),
            "qemu": statistics.median(guest.qemu for guest in up),
            "run": statistics.median(guest.ours for guest in up),
            "daemon": self._daemon(),
            "daemon_per_vm": (self._daemon() - before) / added,
            "file_cached": _resident(files),
            "node_cache_cached": _resident(
                [path for path in self._client.cache.rglob("*") if path.is_file()]
            ),
        }

    def _daemon(self) -> int:
        """Bytes of the daemon's processes (Pss)."""
        status = node_client.daemon_call(self._client.run_dir, "status")
        supervisor = status["supervisor"]
        pids = (status["pid"], supervisor["pid"], supervisor["server"])
        return sum(proportional_memory(int(pid)) for pid in pids)

    def _attach_all(self) -> Sample:
        client = self._client
        places, _ = open_places(str(client.store), str(client.cache), str(client.run_dir))
        read = reading(())
        with node_daemon(client), _sleepers(self._attachments + 1) as sleepers:
            first, *others = [ProcessId.of(pid) for pid in sleepers]
            places.attach(self._reference, None, read, process=first)
            before = self._daemon()
            mark = self._registry.mark()
            times = []
            for process in others:
                begin = time.perf_counter()
                places.attach(self._reference, None, read, process=process)
                times.append(time.perf_counter() - begin)
            (attached,) = node_client.daemon_call(client.run_dir, "attachments")
            memory = self._daemon() - before
            asked = self._registry.since(mark)
            ends = []
            for process in (first, *others):
                begin = time.perf_counter()
                node_client.release(client.run_dir, process)
                ends.append(time.perf_counter() - begin)
            left = node_client.daemon_call(client.run_dir, "attachments")
        return {
            "users": attached["users"],
            "left": len(left),
            "attach": statistics.median(times),
            "attach_max": max(times),
            "release": statistics.median(ends),
            "daemon_each": memory / len(others),
            "requests_each": asked["requests"] / len(others),
            "blob_gets": asked["blob_gets"],
        }


@contextlib.contextmanager
def _sleepers(count: int) -> Iterator[list[int]]:
    """Processes that do nothing, as users of attachments."""
    sleeping = [subprocess.Popen(["sleep", "100000"]) for _ in range(count)]
    try:
        yield [process.pid for process in sleeping]
    finally:
        for process in sleeping:
            process.kill()
        for process in sleeping:
            process.wait()


def _resident(files: list[Path]) -> int:
    """Bytes of these files that are in the page cache."""
    if not files:
        return 0
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    return sum(int(size) for size in output_of(command).split())


if __name__ == "__main__":
    main()
