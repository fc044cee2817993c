"""`imgsnap vm run`: guests that boot from lazily fetched snapshots, under emulation."""

import fcntl
import hashlib
import http.server
import io
import json
import os
import pty
import select
import signal
import struct
import sys
import tarfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import Cli, refused
from tests.support.docker_registry import DockerRegistry
from tests.support.guest import kit
from tests.support.image_builder import image, write_layout
from tests.support.node import node_daemon, wait_for
from tests.support.samples import base_tar, noise, program_tar, top_tar
from tests.support.tars import Item, layer_tar
from tests.support.vm import Vm

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"
NOISE = 12_000_000
WALK = "cd / && find . -xdev -type f -print0 | xargs -0 sha256sum"
RUN = {
    "Entrypoint": ["/bin/busybox", "sh", "-c"],
    "Cmd": ["id -u; id -g; id -G; pwd; echo $GREETING; tty; readlink -f /dev/stdout; exit 7"],
    "Env": ["GREETING=hello  world 'quoted'", "PATH=/nowhere:/bin"],
    "WorkingDir": "/srv/made",
    "User": "app",
}


@pytest.fixture
def vm(cli: Cli) -> Iterator[Vm]:
    with node_daemon(cli) as node:
        yield Vm(node, kit())


def tars() -> list[bytes]:
    large = layer_tar([Item(b"large", content=noise(NOISE, 9))])
    return [program_tar(), base_tar(NOISE), top_tar(), large]


@pytest.fixture
def remote(vm: Vm, registry: DockerRegistry, name: str, tmp_path: Path) -> str:
    """A snapshot in a registry, of which this node has nothing."""
    write_layout(tmp_path / "image", image(*tars(), run=RUN))
    reference = f"{registry.address}/{name}:snap"
    vm.cli.convert(f"oci:{tmp_path}/image", reference, HTTP)
    return reference


def shell(script: str) -> list[str]:
    """In place of the image's Cmd."""
    return ["--", script]


def reference_sums() -> dict[str, str]:
    """SHA-256 of each regular file of the image, by Python's tarfile and the image-spec's rules."""
    found: dict[str, str] = {}
    for raw in tars():
        with tarfile.open(fileobj=io.BytesIO(raw), errors="surrogateescape") as tar:
            for member in tar:
                parent, _, base = member.name.rpartition("/")
                content = tar.extractfile(member) if member.isreg() else None
                if base.startswith(".wh."):
                    del found[f"./{parent}/{base.removeprefix('.wh.')}"]
                elif content is not None:
                    found[f"./{member.name}"] = hashlib.sha256(content.read()).hexdigest()
                elif member.islnk():
                    found[f"./{member.name}"] = found[f"./{member.linkname}"]
    return found


def walked(output: str) -> dict[str, str]:
    lines = (line.split("  ", 1) for line in output.splitlines())
    return {path: digest for digest, path in lines}


def fetched(report: Path) -> int:
    """Bytes that the block server asked the registry for."""
    reads = json.loads(report.read_text())["reads"]
    return sum(reads[kind]["bytes"] for kind in ("demand", "readahead", "prefetch", "pack"))


# Boots -------------------------------------------------------------------------------------------


def test_the_image_decides_who_runs_and_only_what_is_read_is_fetched(
    vm: Vm, remote: str, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    result = vm.run(HTTP, "--prefetch", "off", "--report", report, remote)
    assert result.code == 7, result.err
    uid, gid, groups, cwd, greeting, tty, stdout = result.out.splitlines()
    assert (uid, gid, sorted(groups.split())) == ("1234", "2345", ["2345", "3456"])
    assert (cwd, greeting) == ("/srv/made", "hello world 'quoted'")
    assert (tty, stdout) == ("not a tty", "/dev/ttyS0")
    assert 0 < fetched(report) < NOISE / 2, "two thirds of the image are noise nobody read"
    times = json.loads(report.read_text())["seconds"]
    names = ["attached", "qemu", "started", "ready", "output", "ended"]
    assert [*times] == names and sorted(times.values()) == [*times.values()]
    assert vm.left() == []


def test_every_file_is_right_while_block_servers_are_killed(vm: Vm, remote: str) -> None:
    process = vm.start(HTTP, "--prefetch", "off", remote, *shell(f"id -u; {WALK}"))
    ended, kills = threading.Event(), 0

    def kill_servers() -> None:
        nonlocal kills
        while not ended.wait(0.7):
            server = vm.node.server()
            if server is not None and vm.node.attachments():
                vm.node.kill(server)
                kills += 1

    killer = threading.Thread(target=kill_servers)
    killer.start()
    try:
        out, err = process.communicate(timeout=120)
    finally:
        ended.set()
        killer.join()
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert kills >= 3, "during the boot and the walk"
    first, _, walk = out.decode("utf-8", "surrogateescape").partition("\n")
    assert first == "1234"
    assert walked(walk) == reference_sums()
    wait_for(vm.node.server, "the next server")
    assert vm.left() == []


def test_a_guest_reaches_its_host_and_keeps_changes_on_a_scratch_disk(vm: Vm, remote: str) -> None:
    script = (
        "while read d m t o; do [ $m = / ] && echo $t; done </proc/mounts;"
        "dd if=/dev/zero of=/tmp/big bs=1M count=300 2>/dev/null; stat -c %s /tmp/big;"
        "set -- $(ip route); wget -q -O - http://$3:$PORT/"
    )
    with served(b"from the host\n") as port:
        result = vm.run(
            HTTP, "--net", "--scratch", "400MiB", remote, *shell(f"PORT={port}; {script}")
        )
    assert result.code == 0, result.err
    kind, size, page = result.out.splitlines()[-3:]
    assert (kind, size, page) == ("overlay", str(300 << 20), "from the host")
    assert "the guest is 10.213." in result.err
    assert vm.left() == []


class _Page(http.server.BaseHTTPRequestHandler):
    content = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments: object) -> None:
        pass


class served:  # noqa: N801 - a context manager
    """A web server on all addresses; its port."""

    def __init__(self, content: bytes) -> None:
        handler = type("Page", (_Page,), {"content": content})
        self._server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_address[1]

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_recorded_boot_is_replayed_from_a_boot_pack(vm: Vm, remote: str, tmp_path: Path) -> None:
    trace, report = tmp_path / "boot.json", tmp_path / "report.json"
    script = "sha256sum /usr/text; head -c 100000 /large | sha256sum"
    first = vm.run(HTTP, "--trace", trace, remote, *shell(script))
    assert first.code == 0 and f"{trace}: " in first.err
    vm.cli("optimize", HTTP, remote, "--trace", trace)
    vm.node.close()
    for path in sorted((vm.cli.cache / "v1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    vm.node.start()
    second = vm.run(HTTP, "--report", report, remote, *shell(script))
    assert (second.code, second.out) == (0, first.out), second.err
    reads = json.loads(report.read_text())["reads"]
    assert reads["pack"]["requests"] == 1 and reads["pack"]["failures"] == 0
    assert reads["pack"]["used"] > 0.7 * reads["pack"]["blocks"], reads
    assert reads["demand"]["requests"] <= 1, reads  # only the guest reads ahead
    assert vm.left() == []


def test_a_terminal_is_the_commands_terminal(vm: Vm, remote: str) -> None:
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 0, 0))
    before = termios.tcgetattr(side)
    arguments = vm.arguments(HTTP, remote, *shell("stty size; exec sh -i"))
    pid = os.fork()
    if pid == 0:
        os.login_tty(side)
        command = [sys.executable, "-m", "imgsnap_cli", *map(str, arguments)]
        os.execve(sys.executable, command, vm.cli.environment(vm.env))
    try:
        seen = read_until(main, b"33 77")
        os.write(main, b"sleep 1000\r")
        seen += read_until(main, b"sleep 1000")
        time.sleep(0.5)  # the command is to have the terminal
        os.write(main, b"\x03")
        os.write(main, b"tty; exit 9\r")
        seen += read_until(main, b"/dev/ttyS0")
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    assert os.waitstatus_to_exitcode(status) == 9, seen
    assert termios.tcgetattr(side) == before
    os.close(main)
    os.close(side)
    assert vm.left() == []


def read_until(fd: int, wanted: bytes) -> bytes:
    seen, deadline = b"", time.monotonic() + 60
    while wanted not in seen:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(fd, 4096)
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_boot_leaves_nothing(vm: Vm, remote: str, number: signal.Signals) -> None:
    process = vm.start(HTTP, "--net", remote, *shell("sleep 1000"))
    try:
        wait_for(lambda: any("process" in left for left in vm.left()), "QEMU")
        assert any("namespace" in left for left in vm.left())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number, err
    assert vm.left() == []


def test_a_killed_run_is_cleaned_up_by_the_next(vm: Vm, remote: str) -> None:
    process = vm.start(HTTP, remote, *shell("sleep 1000"))
    wait_for(lambda: any("process" in left for left in vm.left()), "QEMU")
    process.kill()
    process.communicate()
    wait_for(lambda: not any("process" in left for left in vm.left()), "QEMU's end")
    vm.cli("attach", HTTP, remote)
    vm.cli("detach", vm.node.attachments()[0]["id"][:12])
    # The daemon looks for dead processes every two seconds.
    wait_for(lambda: vm.node.attachments() == [], "the end of what the killed run had attached")
    for path in vm.cli.tmp.iterdir():  # a killed process leaves its temporary files, as any does
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_the_time_can_be_limited(vm: Vm, remote: str) -> None:
    refused(vm.run(HTTP, "--timeout", "0.5", remote), 124, hint=False)
    result = vm.run(HTTP, "--timeout", "15", remote, *shell("echo up; sleep 1000"))
    refused(result, 124, hint=False)
    assert vm.left() == []


def test_what_was_attached_before_stays(vm: Vm, remote: str) -> None:
    path = vm.cli("attach", HTTP, remote).out.strip()
    assert "attached already" in vm.fails(
        10, *kernel_of(vm), HTTP, "--trace", vm.cli.root / "trace.json", remote
    )
    assert vm.run(HTTP, remote).code == 7
    assert Path(path).exists()
    vm.cli("detach", path)
    assert vm.left() == []


# Bad input ---------------------------------------------------------------------------------------


def kernel_of(vm: Vm) -> list[object]:
    return ["--kernel", vm.kit.kernel, "--modules", vm.kit.modules]


def test_what_is_refused_before_anything_is_attached(vm: Vm, tmp_path: Path) -> None:
    kernel, absent = kernel_of(vm), "store:absent"
    tools = tmp_path / "bin"
    tools.mkdir()
    empty = {"PATH": str(tools)}
    assert "qemu-system-x86_64 is not installed" in vm.fails(8, *kernel, absent, env=empty)
    (tools / "qemu-system-x86_64").symlink_to(vm.kit.qemu)
    assert "busybox is not installed" in vm.fails(8, *kernel, absent, env=empty)
    assert "no kernel" in vm.fails(4, "--kernel", tmp_path / "none", absent)
    (tmp_path / "text").write_text("no kernel" * 100)
    assert "bzImage" in vm.fails(2, "--kernel", tmp_path / "text", absent)
    assert "too little" in vm.fails(2, *kernel, "--memory", "32MiB", absent)
    assert "MiB are free" in vm.fails(9, *kernel, "--memory", "9000GiB", absent)
    assert "--memory" in vm.fails(2, *kernel, "--memory", "much", absent)
    assert "scratch" in vm.fails(2, *kernel, "--scratch", "1KiB", absent)
    refused(vm.run(absent), 4, hint=False)
    assert vm.left() == []


def test_kernels_that_lack_something_are_refused_before_the_boot(vm: Vm, tmp_path: Path) -> None:
    modules, absent = tmp_path / "modules", "store:absent"
    (modules / "kernel").mkdir(parents=True)
    for path in vm.kit.modules.resolve().rglob("*.ko*"):
        if not path.name.startswith(("erofs", "virtio_blk", "virtio_pmem")):
            (modules / "kernel" / path.name).symlink_to(path)
    (modules / "modules.builtin").write_bytes((vm.kit.modules / "modules.builtin").read_bytes())
    said = vm.fails(8, "--kernel", vm.kit.kernel, "--modules", modules, absent)
    assert "CONFIG_EROFS_FS" in said and "CONFIG_VIRTIO_BLK" in said
    assert "CONFIG_VIRTIO_PMEM" not in said, "--dax alone needs it"
    said = vm.fails(8, "--kernel", vm.kit.kernel, "--modules", modules, "--dax", absent)
    assert "CONFIG_VIRTIO_PMEM" in said


@pytest.mark.skipif(Path("/dev/ublk-control").exists(), reason="this kernel has the driver")
def test_a_disk_without_the_driver_is_refused(vm: Vm, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", image(program_tar(), run=RUN))
    vm.cli.convert(f"oci:{tmp_path}/image", "store:app")
    said = vm.fails(8, *kernel_of(vm), "--via", "ublk", "store:app")
    assert "no ublk driver" in said and "--via fuse" in said
    assert vm.left() == []


def test_an_image_for_another_architecture_is_refused(vm: Vm, tmp_path: Path) -> None:
    other = image(program_tar(), run=RUN, architecture="arm64")
    write_layout(tmp_path / "image", other)
    vm.cli.convert(f"oci:{tmp_path}/image", "store:arm", "--platform", "linux/arm64")
    assert "arm64" in vm.fails(8, *kernel_of(vm), "--platform", "linux/arm64", "store:arm")
    assert vm.left() == []


def test_nothing_boots_that_a_policy_refuses(vm: Vm, remote: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "reject"}]}')
    kernel = ["--kernel", vm.kit.kernel, "--modules", vm.kit.modules]
    said = vm.fails(11, *kernel, "--policy", policy, HTTP, remote)
    assert "the policy rejects" in said
    assert vm.cli("attachments", "--format", "json").json["attachments"] == []


def test_a_program_that_is_not_there(vm: Vm, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", image(program_tar(), run={"Env": ["PATH=/bin"]}))
    vm.cli.convert(f"oci:{tmp_path}/image", "store:app")
    assert "names no command" in vm.fails(2, *kernel_of(vm), "store:app")
    result = vm.run("store:app", "--", "nonsense")
    assert (result.code, result.out) == (127, "imgsnap: nonsense: not found\n")
    assert vm.run("store:app", "--", "/etc/passwd").code == 126
    assert vm.left() == []


def test_without_being_told_it_uses_kvm_or_says_why_not(vm: Vm, tmp_path: Path) -> None:
    write_layout(tmp_path / "image", image(program_tar(), run={"Env": ["PATH=/bin"]}))
    vm.cli.convert(f"oci:{tmp_path}/image", "store:app")
    arguments = [item for item in vm.arguments("store:app", "--", "pwd") if item != "--emulate"]
    result = vm.cli.any(*arguments, env=vm.env)
    assert (result.code, result.out) == (0, "/\n"), result.err
    assert result.err == "" or "the guest is emulated" in result.err
    again = vm.cli.any(*arguments, env=vm.env)
    assert (again.code, again.out) == (0, "/\n"), again.err
    assert (again.err == "") == (result.err == ""), "what was found out is remembered"
