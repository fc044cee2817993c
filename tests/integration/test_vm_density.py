"""Many guests of one snapshot: fetched once, kept once, and mapped where the guest asks for it."""

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.support.cli import Cli, refused
from tests.support.docker_registry import DockerRegistry
from tests.support.guest import BOOT_TRIES, kit
from tests.support.image_builder import image, write_layout
from tests.support.node import node_daemon
from tests.support.samples import noise, program_tar
from tests.support.tars import Item, layer_tar
from tests.support.vm import Vm, emulator_failed

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"
GUESTS = 3
NOISE = 24_000_000
WALK = "cd / && find . -xdev -type f -print0 | xargs -0 sha256sum"
CACHED = "cat /large /bin/busybox >/dev/null; grep ^Cached: /proc/meminfo"


@pytest.fixture
def vm(cli: Cli) -> Iterator[Vm]:
    with node_daemon(cli) as node:
        yield Vm(node, kit())


@pytest.fixture
def remote(vm: Vm, registry: DockerRegistry, name: str, tmp_path) -> str:
    """A snapshot in a registry, of which this node has nothing."""
    large = layer_tar([Item(b"large", content=noise(NOISE, 5))])
    run = {"Entrypoint": ["/bin/busybox", "sh", "-c"], "Env": ["PATH=/bin"]}
    write_layout(tmp_path / "image", image(program_tar(), large, run=run))
    reference = f"{registry.address}/{name}:snap"
    vm.cli.convert(f"oci:{tmp_path}/image", reference, HTTP)
    return reference


def test_guests_at_once_fetch_each_chunk_once(
    vm: Vm, remote: str, registry: DockerRegistry
) -> None:
    packs = vm.cli("inspect", HTTP, remote, "--format", "json").json["packs"]
    registry.accesses()
    for walk in run_at_once(vm, remote):
        assert right(walk)
    got = [access for access in registry.accesses() if access.method == "GET"]
    for pack in packs:
        fetched = sum(access.size for access in got if pack["digest"] in access.path)
        assert 0.9 * pack["size"] < fetched <= pack["size"], "each chunk, and none twice"
    assert vm.left() == []


def right(walk: str) -> bool:
    """Whether each file is there, with the bytes that went into the image."""
    files = {"./large": noise(NOISE, 5)}
    with tarfile.open(fileobj=io.BytesIO(program_tar())) as tar:
        members = ((member.name, tar.extractfile(member)) for member in tar if member.isreg())
        files |= {f"./{name}": file.read() for name, file in members if file is not None}
    sums = {f"{hashlib.sha256(data).hexdigest()}  {name}" for name, data in files.items()}
    return set(walk.splitlines()) == sums


def run_at_once(vm: Vm, remote: str) -> list[str]:
    """What guests that all read the whole snapshot printed."""
    with ExitStack() as stack:
        started = [stack.enter_context(walking(vm, remote)) for _ in range(GUESTS)]
        return [finish(stack, vm, remote, process) for process in started]


@contextmanager
def walking(vm: Vm, remote: str) -> Iterator[subprocess.Popen]:
    process = vm.start(HTTP, "--prefetch", "off", remote, "--", WALK)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(stack: ExitStack, vm: Vm, remote: str, process: subprocess.Popen) -> str:
    """What it printed. A boot that the emulator failed is repeated, which fetches nothing anew."""
    for _ in range(BOOT_TRIES):
        out, err = process.communicate(timeout=150)
        if not emulator_failed(process.returncode, err.decode()):
            break
        process = stack.enter_context(walking(vm, remote))
    assert process.returncode == 0, err
    return out.decode()


def test_a_mapped_snapshot_takes_no_page_cache_of_the_guest(vm: Vm, remote: str) -> None:
    refused(vm.run(HTTP, "--dax", remote, "--", CACHED), 8)
    assert vm.left() == []
    vm.cli("warm", HTTP, "--progress", "none", remote)
    plain, mapped = cached(vm, remote), cached(vm, remote, "--dax")
    assert plain > NOISE and mapped < plain / 5, (plain, mapped)
    walk = vm.run(HTTP, "--dax", remote, "--", WALK)
    assert walk.code == 0 and right(walk.out), walk
    assert vm.left() == []


def cached(vm: Vm, remote: str, *options: str) -> int:
    """Bytes of page cache in a guest that has read the snapshot."""
    result = vm.run(HTTP, *options, remote, "--", CACHED)
    found = re.search(r"^Cached: +(\d+) kB", result.out, re.MULTILINE)
    assert found is not None, result
    return int(found[1]) << 10


def test_a_mapped_snapshot_with_scratch_disk_and_network(vm: Vm, remote: str) -> None:
    vm.cli("warm", HTTP, "--progress", "none", remote)
    script = "dd if=/dev/zero of=/big bs=1M count=300 2>/dev/null; stat -c %s /big; ip addr"
    result = vm.run(HTTP, "--dax", "--scratch", "400MiB", "--net", remote, "--", script)
    assert result.code == 0, result.err
    assert result.out.startswith(f"{300 << 20}\n") and "10.213." in result.out
    assert vm.left() == []


def test_what_cannot_be_mapped(vm: Vm) -> None:
    kernel = ["--kernel", vm.kit.kernel, "--modules", vm.kit.modules]
    said = vm.fails(2, *kernel, "--dax", "--via", "ublk", "store:absent")
    assert "--dax maps a file" in said
    trace = vm.cli.root / "trace.json"
    assert "--trace" in vm.fails(2, *kernel, "--dax", "--trace", trace, "store:absent")


@pytest.mark.parametrize(("name", "machine"), [("qemu", "q35"), ("qemu-microvm", "microvm")])
def test_qemu_takes_the_printed_options_any_number_of_times(
    vm: Vm, tmp_path, name: str, machine: str
) -> None:
    write_layout(tmp_path / "image", image(program_tar()))
    vm.cli.convert(f"oci:{tmp_path}/image", "store:app")
    words = vm.cli("attach", "store:app", "--format", name).out.split()
    path = vm.cli("attach", "store:app").out.strip()
    command = [vm.kit.qemu, "-M", machine, "-accel", "tcg", "-S", "-nodefaults", "-display", "none"]
    with ExitStack() as stack:
        running = [stack.enter_context(Qmp([*command, *words])) for _ in range(2)]
        for qemu in running:
            (block,) = qemu.ask("query-block")
            assert block["inserted"]["node-name"] == "rootfs" and block["inserted"]["ro"]
            assert block["inserted"]["file"] == path and block["qdev"]
    vm.cli("detach", path)


class Qmp:
    """A QEMU that is asked over its control protocol (docs/interop/qmp-spec.rst)."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*command, "-qmp", "stdio"], stdin=pipe, stdout=pipe)

    def __enter__(self) -> "Qmp":
        assert "QMP" in self._line()
        self.ask("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"execute": what}).encode() + b"\n")
        self._process.stdin.flush()
        return self._line()["return"]

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline() or b"{}")
