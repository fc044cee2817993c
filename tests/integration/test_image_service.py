"""Registry credentials that come with CRI's pulls, through real containerds and a real registry."""

import json
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from imgsnap.containerd.api.cri.v1 import cri_pb2 as pb
from imgsnap.errors import AccessDenied
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import parse_location
from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, Containerd, release, running_containerd
from tests.support.cri import Cri, cri
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, running_registry
from tests.support.image_builder import collect, image
from tests.support.registry import ScriptedRegistry
from tests.support.samples import program_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.fixture
def private(tmp_path: Path) -> Iterator[DockerRegistry]:
    """A registry that wants a name and a password, with two images of each of two repositories."""
    with running_registry(tmp_path / "registry") as registry:
        for name in ("team/app", "team/other"):
            for tag in ("1", "2"):
                registry.put(name, collect(image(program_tar()), tag))
        registry.stop()
        registry.auth = True
        registry.start()
        yield registry


class Node:
    """A containerd, and the snapshotter's process with the image service in front of it."""

    def __init__(self, cli: Cli, containerd: Containerd) -> None:
        self.cli = cli
        self.containerd = containerd
        self.file = cli.run_dir / "pod-credentials.json"
        self.socket = cli.run_dir / "images"

    def kept(self) -> dict[str, dict[str, str]]:
        return json.loads(self.file.read_text())["auths"] if self.file.exists() else {}


@pytest.fixture(params=VERSIONS)
def node(request: pytest.FixtureRequest, cli: Cli, private: DockerRegistry) -> Iterator[Node]:
    with running_containerd(release(request.param), cri=True) as containerd:
        containerd.allow_http(private.address)
        node = Node(cli, containerd)
        sockets = ["--address", cli.run_dir / "s", "--image-service", node.socket]
        places = ["--root", cli.root / "snapshotter", "--containerd", containerd.socket]
        process = cli.start("snapshotter", "run", *sockets, *places)
        try:
            with cri(node.socket) as calls:
                ready = pb.ImageFsInfoRequest()
                calls.images.ImageFsInfo(ready, wait_for_ready=True, timeout=60)
            yield node
        finally:
            process.terminate()
            process.communicate(timeout=30)


def manifest_of(reference: str, file: Path) -> bytes:
    options = RegistryOptions(pod_credentials=file)
    location = parse_location(reference)
    found, tag = open_repository(location, options, store=Path("/none"), environ={})
    with closing(found):
        return found.manifest(tag).raw


def refused(calls: Cri, reference: str, user: str, password: str) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        calls.pull(reference, user, password)
    return caught.value.code()


def answers(calls: Cri) -> bool:
    try:
        calls.images.ListImages(pb.ListImagesRequest())
    except grpc.RpcError:
        return False
    return True


def test_credentials_of_a_pull_are_kept(node: Node, private: DockerRegistry):
    app, other = (f"{private.address}/team/{name}" for name in ("app", "other"))
    with cri(node.socket) as calls, cri(node.containerd.socket) as direct:
        with pytest.raises(AccessDenied):
            manifest_of(f"{app}:1", node.file)
        calls.pull(f"{app}:1", USER, PASSWORD)
        assert direct.has_image(f"{app}:1")
        assert node.kept() == {app: {"username": USER, "password": PASSWORD}}
        assert stat.S_IMODE(node.file.stat().st_mode) == 0o600
        assert b"layers" in manifest_of(f"{app}:2", node.file)
        with pytest.raises(AccessDenied):  # they were not given for this one
            manifest_of(f"{other}:1", node.file)
        calls.pull(f"{other}:1", USER, PASSWORD)
        assert list(node.kept()) == [app, other]
        assert b"layers" in manifest_of(f"{other}:2", node.file)


def test_wrong_credentials_replace_nothing(node: Node, private: DockerRegistry):
    app = f"{private.address}/team/app"
    with cri(node.socket) as calls, cri(node.containerd.socket) as direct:
        code = refused(calls, f"{app}:1", USER, "wrong")
        assert code is refused(direct, f"{app}:1", USER, "wrong")
        assert node.kept() == {}
        calls.pull(f"{app}:1", USER, PASSWORD)
        refused(calls, f"{app}:2", USER, "wrong")
        assert node.kept() == {app: {"username": USER, "password": PASSWORD}}
        refused(calls, f"{app}:2", "", "")
        refused(calls, "NOT A NAME", USER, PASSWORD)
        assert node.kept() == {app: {"username": USER, "password": PASSWORD}}
        assert [path.name for path in node.cli.run_dir.glob(".pod*")] == []


def test_everything_else_passes(node: Node, private: DockerRegistry):
    app = f"{private.address}/team/app:1"
    with cri(node.socket) as calls, cri(node.containerd.socket) as direct:
        calls.pull(app, USER, PASSWORD)
        listed = pb.ListImagesRequest()
        assert calls.images.ListImages(listed) == direct.images.ListImages(listed)
        assert len(calls.images.ListImages(listed).images) == 1
        calls.remove_image(app)
        assert not direct.has_image(app)
        codes = []
        for to in (calls, direct):  # a call that only newer ones have
            with pytest.raises(grpc.RpcError) as caught:
                list(to.images.StreamImages(pb.StreamImagesRequest()))
            codes.append(caught.value.code())
        assert codes == [grpc.StatusCode.UNIMPLEMENTED] * 2
        with pytest.raises(grpc.RpcError) as caught:  # no other service is offered here
            calls.runtime.Version(pb.VersionRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        node.containerd.stop()
        with pytest.raises(grpc.RpcError) as caught:
            calls.images.ListImages(listed)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        node.containerd.start()
        deadline = time.monotonic() + 30
        while not answers(calls):
            assert time.monotonic() < deadline, "the image service does not find containerd again"
            time.sleep(0.05)


def test_a_pull_that_is_given_up_ends_in_containerd(node: Node):
    made = image(program_tar())
    with ScriptedRegistry() as slow:
        blobs = collect(made, "1")
        for digest, data in blobs.by_digest.items():
            assert slow.add_blob("app", data) == digest
        [(tag, entry)] = blobs.names
        slow.add_manifest("app", blobs.by_digest[entry["digest"]], entry["mediaType"], tag)
        slow.switches.stall_times = 100
        node.containerd.allow_http(slow.host)
        with cri(node.socket) as calls:
            spec = pb.ImageSpec(image=f"{slow.host}/app:1")
            call = calls.images.PullImage.future(pb.PullImageRequest(image=spec))
            assert slow.stalled.acquire(timeout=60)
            assert "context canceled" not in node.containerd.log
            call.cancel()
            deadline = time.monotonic() + 60
            while "context canceled" not in node.containerd.log:
                assert time.monotonic() < deadline, "containerd goes on"
                time.sleep(0.05)
