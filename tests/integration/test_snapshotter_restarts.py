"""What the snapshotter finds when the machine, or all of the node daemon, was restarted."""

import contextlib
import ctypes
import os
import shutil
import signal

import pytest

from imgsnap.mount import attach, linux
from tests.support.cli import Cli
from tests.support.containerd import fresh_id, release, running_containerd
from tests.support.docker_registry import DockerRegistry
from tests.support.installed import BUSYBOX, NAME, Ours, ours, pull, reached, run
from tests.support.node import wait_for

pytestmark = [pytest.mark.root, pytest.mark.registry]
_libc = ctypes.CDLL(None)


def kill_daemon(it: Ours) -> None:
    """All of its processes at once: the superblock is gone."""
    node = it.node
    control, supervisor, server = (
        node._pid(node.places.control_socket),
        node.supervisor(),
        node.server(),
    )
    os.kill(supervisor.pid, signal.SIGSTOP)  # or it would start another server
    for process in (server, supervisor, control):
        node.kill(process)


def restart_machine(it: Ours) -> None:
    """Nothing runs, nothing is mounted, and what was below /run is gone."""
    it.kill()
    kill_daemon(it)
    places = (f"{it.cli.run_dir}/", f"{it.work}/")
    found = [p.target for p in linux.mount_points() if str(p.target).startswith(places)]
    for target in reversed(found):
        attach.unmount(target, lazy=True)
    shutil.rmtree(it.cli.run_dir)
    it.start()


def test_a_daemon_that_died_altogether(cli: Cli, own_registry: DockerRegistry, fast: str):
    """Its mounts are there, with errors for ever; who made them is not known any more."""
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        pull(cli, containerd, own_registry, fast)
        kill_daemon(it)
        for path in (it.node.places.run_dir / "mounts").glob("*.json"):
            path.unlink()
        assert run(containerd, fast, "cat /app") == "the app\n"
        containerd.remove_image(fast, namespace="k8s.io")
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


@pytest.mark.parametrize("used", [True, False])
def test_a_restart_of_the_machine(used: bool, cli: Cli, own_registry: DockerRegistry, fast: str):
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        pull(cli, containerd, own_registry, fast)
        assert it.states() == ["device"] and len(it.shown()) == 1
        restart_machine(it)
        wait_for(lambda: reached(containerd), "containerd's next attempt to connect")
        if used:
            assert run(containerd, fast, "cat /app") == "the app\n"
        containerd.remove_image(fast, namespace="k8s.io")
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


@pytest.mark.parametrize("how", ["killed", "stopped by force"])
def test_a_daemon_that_ends_below_a_container(
    how: str, cli: Cli, own_registry: DockerRegistry, fast: str
):
    """That container has read errors; others start, and all can be removed."""
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        pull(cli, containerd, own_registry, fast)
        one, where = fresh_id(), {"namespace": "k8s.io"}
        start = ("run", "--detach", "--net-host", "--snapshotter", NAME, fast, one)
        containerd.ctr(*start, BUSYBOX, "sleep", "1000", **where)
        if how == "killed":
            kill_daemon(it)
        else:
            cli("daemon", "stop", "--force")
        assert run(containerd, fast, "cat /app") == "the app\n"
        read = ("tasks", "exec", "--exec-id", fresh_id("e"), one, BUSYBOX, "cat", "/app")
        containerd.ctr_fails(*read, **where)
        assert run(containerd, fast, "cat /app; echo 1 > /app; cat /app") == "the app\n1\n"
        with contextlib.suppress(AssertionError):  # it may have died of a read error
            containerd.ctr("tasks", "kill", "--signal", "9", one, **where)
        wait_for(lambda: "STOPPED" in containerd.ctr("tasks", "ls", **where), "its end")
        containerd.ctr("tasks", "rm", one, **where)
        containerd.ctr("containers", "rm", one, **where)
        containerd.remove_image(fast, **where)
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


def test_it_ends_whichever_thread_is_given_the_signal(cli: Cli):
    with ours(cli) as it:
        threads = sorted(int(tid) for tid in os.listdir(f"/proc/{it.process.pid}/task"))
        assert len(threads) > 1
        assert _libc.tgkill(it.process.pid, threads[-1], signal.SIGTERM) == 0
        assert it.process.wait(30) == 0
        assert "ending on SIGTERM" in (it.work / "log").read_text()
