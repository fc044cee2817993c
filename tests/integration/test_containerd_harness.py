"""The private containerd of the tests itself, with containerd's own snapshotter."""

import os
import time
from pathlib import Path

import pytest

from imgsnap.containerd.api.cri.v1 import cri_pb2 as pb
from tests.support.containerd import VERSIONS, Containerd, release, running_containerd
from tests.support.cri import cri
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.samples import program_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]


def pushed(registry: DockerRegistry, name: str) -> str:
    run = {"Entrypoint": ["/bin/busybox", "sh", "-c"], "Cmd": ["echo hello; sleep 1000"]}
    return registry.put(name, collect(image(program_tar(), run=run)))


def alive(pid: int) -> bool:
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


def gone(containerd: Containerd, pids: list[int]) -> bool:
    """Nothing of a containerd is left."""
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids)) and not containerd.mounts() and not containerd.work.exists()


@pytest.mark.parametrize("series", VERSIONS)
def test_pull_run_and_nothing_left(series: str, registry: DockerRegistry, name: str):
    reference = pushed(registry, name)
    with running_containerd(release(series)) as containerd:
        containerd.pull(reference)
        assert containerd.run(reference, "/bin/busybox", "echo", "hello") == "hello\n"
        assert len(containerd.snapshots("overlayfs")) == 1
        containerd.ctr("run", "--detach", "--net-host", reference, name)
        task = containerd.ctr("tasks", "ls").splitlines()[1].split()
        pids = [int(task[1]), *containerd.shims()]
        assert task[0] == name and len(pids) == 2 and all(map(alive, pids))
        containerd.restart()
        assert all(map(alive, pids)) and name in containerd.ctr("tasks", "ls")
        containerd.remove_image(reference)
    assert gone(containerd, pids)


@pytest.mark.parametrize("series", VERSIONS)
def test_pods_in_the_hosts_network(series: str, registry: DockerRegistry, name: str, tmp_path):
    reference = pushed(registry, name)
    with running_containerd(release(series), cri=True, sandbox_image=reference) as containerd:
        containerd.allow_http(registry.address)
        with cri(containerd.socket) as calls:
            calls.pull(reference)
            assert calls.has_image(reference)
            pod = calls.run_pod(name, tmp_path)
            container = calls.start(pod, "one", reference)
            assert calls.status(container).state == pb.CONTAINER_RUNNING
            pids = containerd.shims()
            log = tmp_path / "one.log"
            deadline = time.monotonic() + 10
            while "hello" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            calls.remove_container(container)
            calls.remove_pod(pod)
            calls.run_pod(f"{name}-2", tmp_path)  # left for the harness to end
            pids += containerd.shims()
    assert gone(containerd, pids)


def test_a_killed_body_leaves_nothing(registry: DockerRegistry, name: str):
    reference = pushed(registry, name)
    with pytest.raises(KeyboardInterrupt), running_containerd(release("1.6")) as containerd:
        containerd.pull(reference)
        containerd.ctr("run", "--detach", "--net-host", reference, name)
        pids = containerd.shims()
        assert pids and containerd.process is not None
        os.kill(containerd.process.pid, 9)
        raise KeyboardInterrupt
    assert gone(containerd, pids)
