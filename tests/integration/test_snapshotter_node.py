"""`imgsnap snapshotter run` as it is installed: containerd above it, the node daemon beneath."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, fresh_id, release, running_containerd
from tests.support.cri import cri
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, sha256
from tests.support.installed import BUSYBOX, HTTP, NAME, ours, pull, reached, run
from tests.support.node import wait_for
from tests.support.samples import noise, program_tar
from tests.support.signers import Cosign
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
SIZE, FILES = 400_000, 12
DATA = [Item(f"data/f{n:02}".encode(), content=noise(SIZE, n)) for n in range(FILES)]
APP = [Item(b"app", content=b"the app\n")]
OTHER = [Item(b"other", content=b"the other\n")]


@pytest.fixture
def reference(cli: Cli, own_registry: DockerRegistry, name: str) -> str:
    """An image with a snapshot as its referrer, and `<reference>-fast`, the converted one."""
    tars = (program_tar(), layer_tar(DATA), layer_tar(APP))
    found = own_registry.put(name, collect(image(*tars), "1.0"))
    cli.convert(found, f"{found}-snap", HTTP)
    cli.convert(found, f"{found}-fast", HTTP, "--as", "image")
    return found


@pytest.mark.parametrize("series", VERSIONS)
@pytest.mark.parametrize("kind", ["converted", "by referrer"])
def test_no_layer_is_fetched(series, kind, cli: Cli, own_registry: DockerRegistry, reference: str):
    wanted = f"{reference}-fast" if kind == "converted" else reference
    trust = ("--trust", f"{own_registry.address}/*") if kind == "by referrer" else ()
    with (
        ours(cli, *trust) as it,
        running_containerd(release(series), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        own_registry.accesses()
        calls.pull(wanted)
        layers = image(program_tar(), layer_tar(DATA), layer_tar(APP)).layers
        paths = [a.path for a in own_registry.accesses() if a.method == "GET"]
        assert not [p for p in paths if any(p.endswith(sha256(layer.data)) for layer in layers)]
        assert it.states()[-1] == "device"
        assert run(containerd, wanted, "cat /app; echo 1 > /app; cat /app") == "the app\n1\n"
        assert run(containerd, wanted, "cat /app") == "the app\n", "of a container its own"
        calls.remove_image(wanted)
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


def test_an_untrusted_publisher_is_not_asked(cli: Cli, own_registry: DockerRegistry, reference):
    with (
        ours(cli, "--trust", "registry.example/*") as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        assert it.states() == ["layer"] * 3
        assert run(containerd, reference, "cat /app") == "the app\n"


def test_only_what_a_policy_accepts_is_claimed(
    cli: Cli, own_registry: DockerRegistry, reference: str, tmp_path: Path
):
    """An unsigned snapshot is left alone and the image unpacked; a signed one runs."""
    cosign, policy = Cosign.make(2, tmp_path / "cosign"), tmp_path / "policy.json"
    identity = {"type": "matchRepository"}
    key = {"type": "sigstoreSigned", "keyPath": str(cosign.public), "signedIdentity": identity}
    policy.write_text(json.dumps({"default": [key]}))
    with (
        ours(cli, "--trust", f"{own_registry.address}/*", "--policy", str(policy)) as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        assert it.states() == ["layer"] * 3
        assert run(containerd, reference, "cat /app") == "the app\n"
        calls.remove_image(reference)
        wait_for(lambda: it.states() == [], "nothing left")
        cosign.sign(f"{reference}-snap", "--recursive")
        calls.pull(reference)
        assert it.states()[-1] == "device"
        assert run(containerd, reference, "cat /app") == "the app\n"
        policy.write_text(json.dumps({"default": [{"type": "reject"}]}))
        with pytest.raises(AssertionError, match="not accepted by the policy"):
            run(containerd, reference, "cat /app")


def test_kills_disturb_no_container(cli: Cli, own_registry: DockerRegistry, reference: str):
    """The snapshotter, the control process and the block server, while a container reads."""
    fast = f"{reference}-fast"
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        containerd.allow_http(own_registry.address)
        address = ("--address", containerd.socket, "--namespace", "k8s.io")
        cli("pull", "--containerd", HTTP, *address, fast)
        one = fresh_id()
        containerd.ctr(
            *("run", "--detach", "--net-host", "--snapshotter", NAME, fast, one),
            *(BUSYBOX, "sleep", "1000"),
            namespace="k8s.io",
        )

        def digest(number: int) -> str:
            command = (BUSYBOX, "sha256sum", f"/data/f{number:02}")
            execute = ("tasks", "exec", "--exec-id", fresh_id("e"), one)
            return containerd.ctr(*execute, *command, namespace="k8s.io").split()[0]

        expected = [hashlib.sha256(noise(SIZE, n)).hexdigest() for n in range(FILES)]
        assert digest(0) == expected[0]
        it.kill()
        assert digest(1) == expected[1]
        it.node.kill(it.node.server())
        assert digest(2) == expected[2]
        it.start()
        it.node.kill(it.node._pid(it.node.places.control_socket))
        assert digest(3) == expected[3]
        found = cli("explain", one, "--format", "json").json
        assert found["reads"] > 0 and Path(found["target"]).parents[1] == it.work / "state/devices"
        wait_for(lambda: reached(containerd), "containerd's next attempt to connect")
        second = run(containerd, fast, "cat /app")  # starts another control process
        assert second == "the app\n"
        containerd.ctr("tasks", "kill", "--signal", "9", one, namespace="k8s.io")
        wait_for(lambda: "STOPPED" in containerd.ctr("tasks", "ls", namespace="k8s.io"), "its end")
        containerd.ctr("tasks", "rm", one, namespace="k8s.io")
        containerd.ctr("containers", "rm", one, namespace="k8s.io")
        containerd.remove_image(fast, namespace="k8s.io")
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


def test_a_registry_that_is_away(cli: Cli, own_registry: DockerRegistry, reference: str):
    """What is here starts, also after the daemon and all mounts have gone; what is not says why."""
    fast = f"{reference}-fast"
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        containerd.allow_http(own_registry.address)
        address = ("--address", containerd.socket, "--namespace", "k8s.io")
        cli("pull", "--containerd", HTTP, *address, fast)
        cli("warm", HTTP, "--progress", "none", fast)
        own_registry.stop()
        cli("daemon", "stop", "--force")
        assert run(containerd, fast, "cat /app") == "the app\n"
        for target in it.work.glob("state/devices/*/fs"):
            cli("umount", target)
        cli("cache", "prune", "--all")
        failed = containerd.ctr_fails(
            *("run", "--rm", "--net-host", "--snapshotter", NAME, fast, fresh_id()),
            *(BUSYBOX, "true"),
            namespace="k8s.io",
        )
        assert own_registry.address in failed and "refused" in failed


def test_a_base_shared_with_an_ordinary_image(
    cli: Cli, own_registry: DockerRegistry, reference: str, name: str
):
    """Its layers were claimed for the converted image: the ordinary one gets them all the same."""
    tars = (program_tar(), layer_tar(DATA), layer_tar(OTHER))
    other = own_registry.put(f"{name}-other", collect(image(*tars), "1.0"))
    with (
        ours(cli, "--trust", "*") as it,
        running_containerd(release("1.6"), snapshotter=it.socket, cri=True) as containerd,
        cri(containerd.socket) as calls,
    ):
        containerd.allow_http(own_registry.address)
        calls.pull(reference)
        assert it.states() == ["placeholder", "placeholder", "device"]
        calls.pull(other)
        assert sorted(it.states()) == ["device", "layer", "layer", "layer"]
        seen = "cat /other; sha256sum /data/f05 | head -c 64"
        assert run(containerd, other, seen) == (
            "the other\n" + hashlib.sha256(noise(SIZE, 5)).hexdigest()
        )
        assert run(containerd, reference, "cat /app") == "the app\n"
        calls.remove_image(reference)
        wait_for(lambda: it.shown() == [], "the device's release")
        assert run(containerd, other, "cat /other") == "the other\n"
        calls.remove_image(other)
        wait_for(lambda: it.states() == [], "nothing left")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2)])
def test_two_namespaces_in_any_order(
    order: tuple[int, ...], cli: Cli, own_registry: DockerRegistry, reference: str, name: str
):
    """One image unpacked in one namespace and claimed in the other, beside an ordinary one on its
    base; what is left runs after each removal, and nothing stays behind the last."""
    tars = (program_tar(), layer_tar(DATA), layer_tar(OTHER))
    other = own_registry.put(f"{name}-other", collect(image(*tars), "1.0"))
    images = [("plain", reference), ("lazy", reference), ("lazy", other)]
    seen = {reference: "the app\n", other: "the other\n"}
    with (
        ours(cli, "--trust", "*") as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        containerd.pull(reference, snapshotter=NAME, namespace="plain")
        pull(cli, containerd, own_registry, reference, "lazy")
        assert sorted(it.states()) == ["device", *["layer"] * 3, *["placeholder"] * 2]
        containerd.pull(other, snapshotter=NAME, namespace="lazy")
        left = list(images)
        for number in order:
            for namespace, held in left:
                shown = run(containerd, held, "cat /app /other 2>/dev/null; true", namespace)
                assert shown == seen[held]
            namespace, gone = images[number]
            containerd.remove_image(gone, namespace=namespace)
            left.remove(images[number])
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")
