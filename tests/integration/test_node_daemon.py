"""The node daemon: one block server for all mounts, and what each process's end does to readers."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from imgsnap.mount import linux
from imgsnap.node import rpc, systemd
from imgsnap.node.block_server import HOUSEKEEPING_S
from tests.support.cli import Cli
from tests.support.image_builder import collect, image, write_layout
from tests.support.node import Node, node_daemon, wait_for
from tests.support.samples import many_files, noise

pytestmark = pytest.mark.root

FILES, SIZE = 24, 300_000


@pytest.fixture
def node(cli: Cli):
    with node_daemon(cli) as running:
        yield running


@pytest.fixture
def snapshot(cli: Cli, tmp_path):
    """A snapshot in the local store, of files whose bytes are known."""
    write_layout(tmp_path / "image", image(many_files(size=SIZE, count=FILES)))
    cli.convert(f"oci:{tmp_path}/image", "store:app")
    return "store:app"


def content(number: int) -> bytes:
    return noise(SIZE, number)


def check(tree: Path) -> None:
    for number in range(FILES):
        assert (tree / f"f{number:02}").read_bytes() == content(number)


class Readers:
    """Threads that read all files again and again, past the page caches, and compare."""

    def __init__(self, node: Node, tree: Path, count: int = 3) -> None:
        self.rounds = 0
        self._tree = tree
        ids = [path.stem for path in (node.places.server.attachments / "id").iterdir()]
        self._device = node.places.server.device(sorted(ids)[-1])
        self._end = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(count)]

    def _run(self, seed: int) -> None:
        try:
            while not self._end.is_set():
                for number in range(seed, seed + FILES):
                    path = self._tree / f"f{number % FILES:02}"
                    for cached in (path, self._device):
                        fd = os.open(cached, os.O_RDONLY)
                        try:
                            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                        finally:
                            os.close(fd)
                    assert path.read_bytes() == content(number % FILES)
                self.rounds += 1
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a reader hangs"
        assert self._failures == []

    def another_round(self) -> None:
        seen = self.rounds
        wait_for(lambda: self.rounds > seen + 1 or self._failures, "readers go on")


def test_mounts_of_one_snapshot_share_its_device(node: Node, cli: Cli, snapshot, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    cli("mount", snapshot, one)
    cli("mount", "--rw", snapshot, two)
    check(one)
    check(two)
    (two / "f00").write_bytes(b"changed")
    assert (one / "f00").read_bytes() == content(0)
    listed = cli("mounts", "--format", "json").json["mounts"]
    assert [(m["daemon"], m["alive"], m["writable"]) for m in listed] == [
        (True, True, False),
        (True, True, True),
    ]
    (attachment,) = node.attachments()
    assert attachment["users"] == 2
    erofs = [point.device for point in linux.mount_points() if point.fstype == "erofs"]
    devices = {point.device for point in linux.mount_points() if point.target == one}
    assert devices <= set(erofs), "a bind mount of the shared tree"
    cli.fails(7, "mount", snapshot, one)
    cli.fails(10, "daemon", "stop")
    cli("umount", one)
    assert (two / "f00").read_bytes() == b"changed"
    assert (two / "f01").read_bytes() == content(1)
    assert node.attachments()[0]["users"] == 1
    cli("umount", two)
    wait_for(lambda: node.attachments() == [], "the device is released")
    assert not (tmp_path / "one").exists()
    cli("mount", snapshot, one)
    check(one)
    cli("umount", one)
    cli("daemon", "stop")


def test_each_process_may_be_killed(node: Node, cli: Cli, snapshot, tmp_path):
    tree = tmp_path / "tree"
    cli("mount", snapshot, tree)
    with Readers(node, tree) as readers:
        for _ in range(3):
            first = node.server()
            node.kill(first)
            assert wait_for(node.server, "the next server") != first
            readers.another_round()
        # Without its supervisor a server goes on; the control process starts another supervisor,
        # which takes over the device, and replaces the server when that is killed.
        supervisor, server = node.supervisor(), node.server()
        node.kill(supervisor)
        readers.another_round()
        assert wait_for(node.supervisor, "the next supervisor") != supervisor
        assert node.server() == server
        node.kill(server)
        assert wait_for(node.server, "the next server") != server
        readers.another_round()
        node.kill_control()
        readers.another_round()
        cli("mount", snapshot, tmp_path / "alone")
        check(tmp_path / "alone")
        node.start()
        listed = {
            m["target"]: m["daemon"] for m in cli("mounts", "--format", "json").json["mounts"]
        }
        assert listed == {str(tree): True, str(tmp_path / "alone"): False}
        readers.another_round()
    cli("umount", "--all")


def test_unmounting_needs_no_daemon(node: Node, cli: Cli, snapshot, tmp_path):
    cli("mount", snapshot, tmp_path / "tree")
    node.kill_control()
    check(tmp_path / "tree")
    cli("umount", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_upgrade_keeps_readers(node: Node, cli: Cli, snapshot, tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    cli("mount", snapshot, tree)
    with Readers(node, tree) as readers:
        for _ in range(2):
            before = (node.supervisor(), node.server(), node.status()["started"])
            done = cli("daemon", "upgrade", "--format", "json").json
            after = (node.supervisor(), node.server(), node.status()["started"])
            assert after[0] == before[0], "exec keeps the process"
            assert after[1] != before[1] and after[1].pid == done["server"]
            assert after[2] > before[2]
            readers.another_round()
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "zstandard.py").write_text("raise ImportError('not this version')")
        path = f"{broken}:{cli.environment()['PYTHONPATH']}"
        said = cli.fails(1, "daemon", "upgrade", env={"PYTHONPATH": path}, hint=False)
        assert "not this version" in said
        assert node.server() == after[1], "nothing has changed"
        readers.another_round()
    cli("umount", tree)


def test_after_a_restart_bytes_come_from_the_cache_without_a_registry(
    node: Node, cli: Cli, own_registry, tmp_path
):
    remote = own_registry.put("app", collect(image(many_files(size=SIZE, count=FILES))))
    cli.convert(remote, f"{own_registry.address}/app:snap", "--plain-http")
    tree = tmp_path / "tree"
    cli("mount", "--plain-http", f"{own_registry.address}/app:snap", tree)
    check(tree)
    own_registry.stop()
    node.kill_control()
    node.kill(node.server())
    node.start()
    with Readers(node, tree) as readers:
        readers.another_round()
    cli("umount", tree)


def test_ten_thousand_known_snapshots_are_opened_when_they_are_read(
    node: Node, cli: Cli, snapshot, tmp_path
):
    tree = tmp_path / "tree"
    cli("mount", snapshot, tree)
    check(tree)
    directory = node.places.server.attachments
    (record,) = directory.glob("number/*.json")
    text = record.read_text()
    for number in range(2, 10_001):
        path = directory / "number" / f"{number}.json"
        name = f"{number:064x}"  # before any real digest
        path.write_text(
            text.replace('"number": 1', f'"number": {number}').replace(node_id(text), name)
        )
        os.link(path, directory / "id" / f"{name}.json")
    (directory / "number" / "last").write_text("10000")
    node.kill_control()
    supervisor = node.supervisor()
    node.kill(node.server())
    node.start()
    assert node.supervisor() == supervisor
    status = rpc.call(node.places.server.block_socket, "status")
    assert status["devices"] == {}, "nothing is opened before it is read"
    with Readers(node, tree, count=1) as readers:
        readers.another_round()
    status = rpc.call(node.places.server.block_socket, "status")
    assert len(status["devices"]) == 1
    assert len(node.attachments()) == 10_000
    cli("umount", tree)


def node_id(text: str) -> str:
    return json.loads(text)["id"]


def test_the_service_managers_store_keeps_the_device(cli: Cli, snapshot, tmp_path):
    """What systemd does, by its protocol: it keeps descriptors, and passes them to the next
    supervisor. Both processes that had the device are killed in between; readers wait."""
    cli.run_dir.mkdir(exist_ok=True)
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(20)
    environ = cli.environment({"NOTIFY_SOCKET": str(tmp_path / "notify")})
    command = [sys.executable, "-m", "imgsnap.node.supervise", str(cli.run_dir), str(cli.cache)]
    first = subprocess.Popen(command, env=environ, process_group=0)
    stored = {}
    node = Node(cli)
    second = None
    try:
        while True:
            message, fds, _, _ = socket.recv_fds(notify, 4096, 4)
            fields = dict(line.split("=", 1) for line in message.decode().splitlines())
            if "FDSTORE" in fields:
                stored[fields["FDNAME"]] = fds[0]
            if fields.get("READY") == "1":
                break
        assert sorted(stored) == ["imgsnap-block", "imgsnap-fuse"]
        node.control = cli.start("daemon", "run")
        wait_for(node.status, "the control process")
        tree = tmp_path / "tree"
        cli("mount", snapshot, tree)
        server = node.server()
        with Readers(node, tree) as readers:
            readers.another_round()
            node.kill_control()  # it would start a supervisor by itself
            first.kill()
            first.wait()
            node.kill(server)
            names = ":".join(stored)

            script = (
                "import os,sys\n"
                "os.environ['LISTEN_PID'] = str(os.getpid())\n"
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
            )
            ours = [os.dup(fd) for fd in stored.values()]
            second = subprocess.Popen(
                [sys.executable, "-c", script, *command[1:]],
                env=environ | {"LISTEN_FDS": str(len(ours)), "LISTEN_FDNAMES": names},
                preexec_fn=lambda: [os.dup2(fd, 3 + n) for n, fd in enumerate(ours)],
                close_fds=False,
                process_group=0,
            )
            readers.another_round()
        assert node.server() != server
        cli("umount", tree)
    finally:
        for fd in stored.values():
            os.close(fd)
        node.close()
        for process in (first, second):
            if process is not None:
                process.kill()
                process.wait()


def test_descriptors_are_taken_once_and_by_their_process_only():
    environ = {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())}
    assert systemd.take_descriptors(environ) == {}
    assert environ == {}
    assert systemd.take_descriptors({"LISTEN_FDS": "2", "LISTEN_PID": "1"}) == {}
    assert systemd.take_descriptors({"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())}) == {}
    assert not systemd.notify({}, "READY=1")
    assert not systemd.notify({"NOTIFY_SOCKET": "/nonexistent"}, "READY=1")


def test_what_the_daemon_refuses(node: Node, cli: Cli, snapshot, tmp_path):
    cli.fails(7, "daemon", "run")
    (tmp_path / "file").write_text("")
    cli.fails(2, "mount", snapshot, tmp_path / "file", hint=False)
    cli.fails(4, "mount", "store:missing", tmp_path / "tree", hint=False)
    cli.fails(4, "umount", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    assert node.attachments() == []
    for request in (b"", b"{}\n", b"[1]\n", b'{"op":"mount","args":{}}\n', b"\xff\n"):
        with rpc.connect(node.places.control_socket, 5) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
            assert b'"error"' in answer or not request
    # Another cache: the daemon is not asked.
    elsewhere = {"IMGSNAP_CACHE_DIR": str(tmp_path / "cache2")}
    cli("mount", snapshot, tmp_path / "tree", env=elsewhere)
    assert [m["daemon"] for m in cli("mounts", "--format", "json").json["mounts"]] == [False]
    cli("umount", tmp_path / "tree", env=elsewhere)


def test_without_a_daemon(cli: Cli):
    for command in ("status", "upgrade", "stop"):
        cli.fails(4, "daemon", command, hint=command == "status")


def test_one_supervisor_only(node: Node, cli: Cli, snapshot, tmp_path):
    """A second one must not start a second server on the same device."""
    cli("mount", snapshot, tmp_path / "tree")
    supervisor, server = node.supervisor(), node.server()
    second = cli.any("daemon", "supervise")
    assert second.code == 10 and "another supervisor" in second.err
    # One that does not answer is not dead.
    os.kill(server.pid, signal.SIGSTOP)
    try:
        node.kill(supervisor)
        time.sleep(1)
        assert server.alive and not node.places.server.attachments.joinpath("gone").exists()
        assert list(node.places.server.attachments.glob("id/*.json")), "nothing is cleaned away"
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert wait_for(node.supervisor, "the next supervisor") != supervisor
    assert node.server() == server
    check(tmp_path / "tree")
    cli("umount", tmp_path / "tree")


def test_processes_that_are_stopped_for_a_while_go_on(node: Node, cli: Cli, snapshot, tmp_path):
    cli("mount", snapshot, tmp_path / "tree")
    known = (node.supervisor(), node.server())
    pids = (*(process.pid for process in known), node.control.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(HOUSEKEEPING_S + 0.5)  # each has a deadline that passes
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    check(tmp_path / "tree")
    time.sleep(0.2)  # for one that ends
    assert (node.supervisor(), node.server()) == known and node.control.poll() is None
    cli("umount", tmp_path / "tree")


def test_a_mount_that_fails_half_way_leaves_nothing(node: Node, cli: Cli, snapshot, tmp_path):
    trees = node.places.tree("")
    trees.mkdir(parents=True, exist_ok=True)
    trees.rename(trees.with_name("away"))
    trees.write_text("no directory")
    assert cli.any("mount", snapshot, tmp_path / "tree").code
    trees.unlink()
    trees.with_name("away").rename(trees)
    wait_for(lambda: node.attachments() == [], "the device is released")
    assert not (tmp_path / "tree").exists()
    cli("mount", snapshot, tmp_path / "tree")
    check(tmp_path / "tree")
    cli("umount", tmp_path / "tree")


def test_a_writable_tree_in_use_keeps_its_changes_when_detached(
    node: Node, cli: Cli, snapshot, tmp_path
):
    tree = tmp_path / "tree"
    cli("mount", "--rw", snapshot, tree)
    directory = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        cli("umount", "--lazy", tree)
        fd = os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        os.write(fd, b"still written")
        os.close(fd)
        fd = os.open("f01", os.O_RDONLY, dir_fd=directory)
        assert os.read(fd, SIZE) == content(1)
        os.close(fd)
    finally:
        os.close(directory)
    shutil.rmtree(cli.cache / "rw")
