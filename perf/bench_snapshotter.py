"""containerd with our snapshotter, beside its own overlayfs: a real containerd 1.6, runc, registry.

Parts, chosen by --parts:

  run         `ctr run --rm … /bin/true`, warm: of a converted image, of an ordinary one through the
              fallback, and by overlayfs; `ctr images pull` of the ordinary one, by both
  cold        CRI PullImage and the corpus's start task by `ctr run`, nothing cached, behind a link:
              converted with and without a boot pack, and ordinary by overlayfs
  many        containers' snapshots through containerd's API: prepared, mounted, read, unmounted
              and removed by 16 threads of this process; ours on one device, and overlayfs's
  containers  real runc containers of one image, detached, until each has written a file

Memory is of our processes (snapshotter, control, supervisor, block server). Needs root, the corpus,
containerd 1.6 and, for `cold`, the corpus's tools.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from harness.client import Client
from harness.daemon import node_daemon
from harness.images import Image, corpus_image
from harness.options import parser, skip, work_directory
from harness.processes import (
    child_environment,
    compile_bytecode,
    drop_page_caches,
    end,
    measured,
    output_of,
    proportional_memory,
    running,
)
from harness.registry import docker_registry, push
from harness.report import Report, Sample, tell
from harness.shaped import ShapedRegistry, shaped_registry

from imgsnap.node.client import daemon_call
from imgsnap.snapshotter.labels import SNAPSHOT_DIGEST
from tests.support.containerd import Containerd, find_release, fresh_id, running_containerd
from tests.support.cri import cri
from tests.support.mounts import unmount
from tests.support.snapshots_client import KEPT, SnapshotsClient, mount_one

PARTS = ("run", "cold", "many", "containers")
AIM_RUN = 1.05
AIM_MANY_S = 5.0
AIM_CONTAINERS_S = 30.0
THREADS = 16
COMMITTED = 3
"""containerd's Kind."""
NAME, OVERLAYFS = "imgsnap", "overlayfs"
CRI_NAMESPACE, NAMESPACE = "k8s.io", "bench"
"""The second for all but `cold`: in the first CRI keeps names of its own for images."""


def main() -> None:
    found = parser(__doc__, runs=9)
    found.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    found.add_argument("--image", default="debian-base", help="of all parts but cold [debian-base]")
    found.add_argument("--cold-images", nargs="+", default=["nginx", "python-app"])
    found.add_argument("--rate", default="100mbit", help="of the link [100mbit]")
    found.add_argument("--rtt", default="10ms", help="round trip [10ms]")
    found.add_argument("--snapshots", type=int, default=500, help="in `many` [500]")
    found.add_argument("--containers", type=int, default=500, help="in `containers` [500]")
    arguments = found.parse_args()
    if os.geteuid() != 0:
        raise skip("containerd needs root")
    release = find_release("1.6")
    if isinstance(release, str):
        raise skip(release)
    report = Report("snapshotter", vars(arguments))
    compile_bytecode()
    with work_directory(arguments) as work:
        if set(arguments.parts) - {"cold"}:
            _warm_parts(report, arguments, work)
        if "cold" in arguments.parts:
            _cold_part(report, arguments, work)
    report.finish()


# A node ------------------------------------------------------------------------------------------


@dataclass
class _Node:
    """Our snapshotter with its node daemon, and a containerd that uses it."""

    client: Client
    containerd: Containerd
    socket: Path  # of the snapshotter
    pid: int
    namespace: str = NAMESPACE

    def ctr(self, *arguments: str) -> list[str]:
        return [*self.containerd.ctr_command(self.namespace), *arguments]

    def pull_converted(self, reference: str) -> None:
        output_of(
            self.client.command(
                *("pull", "--containerd", "--plain-http", "--address", self.containerd.socket),
                *("--namespace", self.namespace, reference),
            )
        )

    def run_command(self, snapshotter: str, reference: str, *command: str) -> list[str]:
        options = ("run", "--rm", "--net-host", "--snapshotter", snapshotter)
        return self.ctr(*options, reference, fresh_id("b"), *command)

    def memory(self) -> dict[str, int]:
        """Bytes that our processes have for themselves, by name."""
        status = daemon_call(self.client.run_dir, "status")
        supervisor = status["supervisor"]
        pids = {
            "snapshotter": self.pid,
            "control": status["pid"],
            "supervisor": supervisor["pid"],
            "block server": supervisor["server"],
        }
        return {name: proportional_memory(pid) for name, pid in pids.items()}


@contextlib.contextmanager
def _node(work: Path, client: Client, registry: str, namespace: str = NAMESPACE) -> Iterator[_Node]:
    root, socket = work / "snapshotter", client.root / "s.sock"
    client.run_dir.mkdir(parents=True, exist_ok=True)
    where: tuple[str | Path, ...] = ("--root", root, "--address", socket, "--plain-http")
    with (
        node_daemon(client),
        (work / "snapshotter.log").open("ab") as log,
        running(
            client.command("snapshotter", "run", *where),
            env=child_environment(),
            stdout=log,
            stderr=log,
        ) as process,
    ):
        deadline = time.monotonic() + 30
        while not socket.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"error: {(work / 'snapshotter.log').read_text()[-2000:]}")
            time.sleep(0.02)
        try:
            release = find_release("1.6")
            assert not isinstance(release, str)
            with running_containerd(release, snapshotter=socket, cri=True) as containerd:
                containerd.allow_http(registry)
                yield _Node(client, containerd, socket, process.pid, namespace)
        finally:
            end(process)
            for target in (root / "devices").glob("*/fs"):
                subprocess.run([*map(str, client.command("umount", "--lazy", target))], check=False)
            shutil.rmtree(root, ignore_errors=True)


# Warm --------------------------------------------------------------------------------------------


def _warm_parts(report: Report, arguments: argparse.Namespace, work: Path) -> None:
    image = _image(arguments, arguments.image)
    with docker_registry(work) as registry:
        client = Client(work / "client")
        client.root.mkdir()
        source = push(image, registry.address)
        fast = f"{registry.address}/{image.name}:fast"
        client.convert(source, fast, "--plain-http", "--as", "image")
        with _node(work, client, registry.address) as node:
            node.pull_converted(fast)
            node.containerd.pull(source, snapshotter=OVERLAYFS, namespace=NAMESPACE)
            if "run" in arguments.parts:
                _run_part(report, arguments.runs, node, source, fast)
            if "many" in arguments.parts:
                _many_part(report, arguments, node, work)
            if "containers" in arguments.parts:
                _containers_part(report, arguments, node, source, fast, work)


def _run_part(report: Report, runs: int, node: _Node, source: str, fast: str) -> None:
    def run(snapshotter: str, reference: str) -> Sample:
        return measured(node.run_command(snapshotter, reference, "/bin/true")).as_dict()

    def pull(snapshotter: str) -> Sample:
        node.containerd.remove_image(source, namespace=NAMESPACE)
        command = ("images", "pull", "--plain-http", "--snapshotter", snapshotter, source)
        return measured(node.ctr(*command)).as_dict()

    pulls = {f"pull, {name}": partial(pull, name) for name in (OVERLAYFS, NAME)}
    report.interleave(max(3, runs // 3), pulls)
    for name in (OVERLAYFS, NAME):  # both have it now
        node.containerd.pull(source, snapshotter=name, namespace=NAMESPACE)
    report.interleave(
        runs,
        {
            "run, overlayfs": partial(run, OVERLAYFS, source),
            "run, converted": partial(run, NAME, fast),
            "run, ordinary": partial(run, NAME, source),
        },
    )
    ours, theirs = (report.median(f"pull, {name}", "wall_s") for name in (NAME, OVERLAYFS))
    report.figure("ctr pull, ordinary image", ours, "s", "overlayfs", theirs, AIM_RUN)
    theirs = report.median("run, overlayfs", "wall_s")
    for kind in ("converted", "ordinary"):
        ours = report.median(f"run, {kind}", "wall_s")
        report.figure(f"ctr run, {kind} image", ours, "s", "overlayfs", theirs, AIM_RUN)


def _many_part(report: Report, arguments: argparse.Namespace, node: _Node, work: Path) -> None:
    """On the committed rows that are there: the device, and the ordinary image's top layer."""
    count = arguments.snapshots
    kinds = {"ours": NAME, "overlayfs": OVERLAYFS}
    socket = node.containerd.socket
    steps: dict[str, Callable[[], Sample]] = {
        f"{count} snapshots, {kind}": partial(_many, socket, snapshotter, count, work / "many")
        for kind, snapshotter in kinds.items()
    }
    report.interleave(max(3, arguments.runs // 3), steps)
    label = f"{count} snapshots, ours"
    total = report.median(label, "total_s")
    other = report.median(f"{count} snapshots, overlayfs", "total_s")
    report.figure(f"{count} snapshots: all steps", total, "s", "overlayfs", other)
    report.figure(f"{count} snapshots: all steps", total, "s", "the aim", AIM_MANY_S, 1.0)
    for step in ("prepare", "mount", "read", "unmount", "remove"):
        ours, theirs = (report.median(f"{count} snapshots, {kind}", f"{step}_s") for kind in kinds)
        report.figure(f"  {step}", ours, "s", "overlayfs", theirs)


def _many(socket: Path, snapshotter: str, count: int, work: Path) -> Sample:
    client = SnapshotsClient(socket, snapshotter, namespace=NAMESPACE)
    committed = [info for info in client.list() if info.kind == COMMITTED]
    devices = [info for info in committed if SNAPSHOT_DIGEST in info.labels]
    beneath = {info.parent for info in committed}
    parent = next(info for info in devices or committed if info.name not in beneath).name
    token = uuid.uuid4().hex[:8]
    targets = {f"{token}-{number}": work / str(number) for number in range(count)}
    for target in targets.values():
        target.mkdir(parents=True, exist_ok=True)
    mounts: dict[str, Any] = {}

    def prepare(key: str) -> None:
        mounts[key] = client.prepare(key, parent, KEPT)

    def mount(key: str) -> None:
        for one in mounts[key]:
            mount_one(one, targets[key])

    def read(key: str) -> None:
        (targets[key] / "etc/passwd").read_bytes()
        (targets[key] / "written").write_bytes(b"x")

    steps: dict[str, Callable[[str], None]] = {
        "prepare": prepare,
        "mount": mount,
        "read": read,
        "unmount": lambda key: unmount(targets[key]),
        "remove": client.remove,
    }
    sample: dict[str, float] = {}
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for name, step in steps.items():
                started = time.perf_counter()
                list(pool.map(step, targets))
                sample[f"{name}_s"] = time.perf_counter() - started
    finally:
        for target in targets.values():
            with contextlib.suppress(OSError):
                unmount(target)
    sample["total_s"] = sum(sample.values())
    client.close()
    shutil.rmtree(work, ignore_errors=True)
    return sample


def _containers_part(
    report: Report,
    arguments: argparse.Namespace,
    node: _Node,
    source: str,
    fast: str,
    work: Path,
) -> None:
    count = arguments.containers
    before = node.memory()
    for kind, snapshotter, reference in (
        ("overlayfs", OVERLAYFS, source),
        ("ours", NAME, fast),
    ):
        tell(f"snapshotter: {count} containers, {kind}")
        report.samples[f"{count} containers, {kind}"] = [
            _containers(node, snapshotter, reference, count, work / "out", before)
        ]
    ours = report.median(f"{count} containers, ours", "ready_s")
    other = report.median(f"{count} containers, overlayfs", "ready_s")
    report.figure(f"{count} containers answer", ours, "s", "overlayfs", other, AIM_RUN)
    report.figure(f"{count} containers answer", ours, "s", "ECI's 500 in", AIM_CONTAINERS_S)
    each = report.median(f"{count} containers, ours", "ours_bytes_each")
    report.figure("our memory for each container", each, "B", "", None)
    for name, size in node.memory().items():
        report.figure(f"  {name}, in all", size, "B", "", None)


def _containers(
    node: _Node, snapshotter: str, reference: str, count: int, out: Path, before: dict[str, int]
) -> Sample:
    """Each writes a file when it runs; they are ended afterwards."""
    out.mkdir()
    names = [fresh_id("c") for _ in range(count)]
    mount = f"type=bind,src={out},dst=/mnt,options=rbind:rw"

    def start(name: str) -> None:
        command = ("sh", "-c", f"echo ready > /mnt/{name}; exec sleep 100000")
        options = ("run", "--detach", "--net-host", "--snapshotter", snapshotter)
        output_of(node.ctr(*options, "--mount", mount, reference, name, *command))

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(start, names))
    while len(os.listdir(out)) < count:  # noqa: PTH208
        time.sleep(0.01)
    ready_s = time.perf_counter() - started
    after = node.memory()
    _end_containers(node, names)
    shutil.rmtree(out)
    grown = sum(after.values()) - sum(before.values())
    return {"ready_s": ready_s, "ours_bytes_each": grown / count, "memory": after}


def _end_containers(node: _Node, names: list[str]) -> None:
    def remove(name: str) -> None:
        for command in (("tasks", "rm", "--force", name), ("containers", "rm", name)):
            subprocess.run(node.ctr(*command), capture_output=True, check=False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove, names))


# Cold --------------------------------------------------------------------------------------------


def _cold_part(report: Report, arguments: argparse.Namespace, work: Path) -> None:
    if arguments.tools is None or not (Path(arguments.tools) / "shaped-registry").exists():
        raise skip("no corpus tools (--tools or IMGSNAP_CORPUS_TOOLS)")
    tools = Path(arguments.tools).resolve()
    storage = work / "storage"
    with shaped_registry(tools, storage, arguments.rate, arguments.rtt) as registry:
        for name in arguments.cold_images:
            cold = _Cold(registry, tools, work, _image(arguments, name))
            cold.publish()
            report.interleave(
                max(3, arguments.runs // 3),
                {
                    f"{name}, overlayfs": partial(cold.start, OVERLAYFS, "latest"),
                    f"{name}, converted": partial(cold.start, NAME, "fast"),
                    f"{name}, boot pack": partial(cold.start, NAME, "packed"),
                },
            )
            other = report.median(f"{name}, overlayfs", "ready_s")
            for kind in ("converted", "boot pack"):
                ours = report.median(f"{name}, {kind}", "ready_s")
                report.figure(f"{name}, {kind}: pull to ready", ours, "s", "overlayfs", other)
                pull = report.median(f"{name}, {kind}", "pull_s")
                report.figure(
                    f"{name}, {kind}: PullImage",
                    pull,
                    "s",
                    "overlayfs",
                    report.median(f"{name}, overlayfs", "pull_s"),
                )


@dataclass
class _Cold:
    registry: ShapedRegistry
    tools: Path
    work: Path
    image: Image

    def publish(self) -> None:
        """`latest`, `fast` converted, and `packed` the same in a repository with a boot pack."""
        tell(f"snapshotter: publishing {self.image.name}")
        client = Client(self.work / f"publish-{self.image.name}")
        client.root.mkdir()
        door = self.registry.door
        source = push(self.image, door)
        for repository, tag in ((self.image.name, "fast"), (f"{self.image.name}-p", "packed")):
            client.convert(source, f"{door}/{repository}:{tag}", "--plain-http", "--as", "image")
        packed, trace = f"{door}/{self.image.name}-p:packed", client.root / "trace.json"
        command = client.command("trace", "--plain-http", packed, "-o", trace)
        self._task("--exec", *map(str, command))
        output_of(client.command("optimize", "--plain-http", packed, "--trace", trace))

    def start(self, snapshotter: str, tag: str) -> Sample:
        repository = f"{self.image.name}-p" if tag == "packed" else self.image.name
        reference = f"{self.registry.address}/{repository}:{tag}"
        client = Client(self.work / "node")
        client.root.mkdir()
        try:
            with _node(self.work, client, self.registry.address, CRI_NAMESPACE) as node:
                return self._start(node, snapshotter, reference)
        finally:
            shutil.rmtree(client.root, ignore_errors=True)

    def _start(self, node: _Node, snapshotter: str, reference: str) -> Sample:
        drop_page_caches()
        self.registry.reset()
        started = time.perf_counter()
        if snapshotter == NAME:
            with cri(node.containerd.socket) as calls:
                calls.pull(reference)
        else:
            command = ("images", "pull", "--plain-http", "--snapshotter", OVERLAYFS, reference)
            output_of(node.ctr(*command))
        pull_s = time.perf_counter() - started
        task = self._task("--exec", *node.run_command(snapshotter, reference))
        counts = self.registry.counts()
        return {
            "pull_s": pull_s,
            "ready_s": pull_s + task["ready_s"],
            "task": task,
            "bytes": counts["wire_bytes_down"],
            "requests": counts["requests"],
        }

    def _task(self, *arguments: str) -> dict[str, Any]:
        script = str(self.tools / "start-image")
        lines = output_of([sys.executable, script, self.image.name, *arguments]).splitlines()
        result: dict[str, Any] = json.loads(lines[-1])
        return result


def _image(arguments: argparse.Namespace, name: str) -> Image:
    image = corpus_image(arguments.corpus, name)
    if image is None:
        raise skip(f"no {name} in {arguments.corpus}")
    return image


if __name__ == "__main__":
    main()
