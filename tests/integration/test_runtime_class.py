"""Snapshots for some pods only, as deploy/kubernetes/runtimeclass.yaml says it is done."""

import re
from pathlib import Path

import pytest
import yaml

from imgsnap.containerd.api.cri.v1 import cri_pb2 as pb
from imgsnap.containerd.config import parse_version, snippet
from imgsnap.oci.platforms import host_platform
from tests.support.cli import REPOSITORY
from tests.support.containerd import release, running_containerd
from tests.support.cri import cri
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.samples import program_tar
from tests.support.snapshotter import running_snapshotter

pytestmark = [pytest.mark.root, pytest.mark.registry]
EXAMPLE = REPOSITORY / "deploy/kubernetes/runtimeclass.yaml"


def tables(series: str, socket: Path) -> str:
    """What `imgsnap config containerd` prints, but CRI's snapshotter, and the example's tables."""
    toml = snippet(parse_version(series), socket, Path("/root"), str(host_platform()))
    own = "\n".join(toml.splitlines()[1:]).rpartition("[plugins.")[0]
    lines = EXAMPLE.read_text().splitlines()
    shown = [line[4:].strip() for line in lines if re.match(r"#   +(\[|\w+ =)", line)]
    assert len(shown) == 6 and shown[0].startswith("[") and shown[3].startswith("[")
    if series == "1.7":
        one = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.imgsnap]'
        shown = [one, *shown[1:3], one.replace("imgsnap", "runc"), shown[1]]
    return "\n".join([own, *shown]).replace("linux/amd64", str(host_platform())) + "\n"


@pytest.mark.parametrize("series", ["1.7", "2.1"])
def test_only_annotated_pulls_go_to_the_snapshotter(
    series: str, registry: DockerRegistry, name: str, tmp_path: Path
):
    run_class, pod = yaml.safe_load_all(EXAMPLE.read_text())
    assert run_class["handler"] == pod["spec"]["runtimeClassName"] == "imgsnap"
    reference = registry.put(name, collect(image(program_tar()), "1"))
    with running_snapshotter(tmp_path / "s") as ours:
        extra = tables(series, ours.socket)
        with running_containerd(release(series), cri=True, extra=extra) as containerd:
            containerd.allow_http(registry.address)
            with cri(containerd.socket) as calls:
                calls.pull(reference)
                assert counts(containerd) == (1, 0)
                sandbox = pb.PodSandboxConfig(annotations=pod["metadata"]["annotations"])
                spec = pb.ImageSpec(image=reference)
                calls.images.PullImage(pb.PullImageRequest(image=spec, sandbox_config=sandbox))
                assert counts(containerd) == (1, 1)
                calls.remove_image(reference)


def counts(containerd) -> tuple[int, int]:
    names = ("overlayfs", "imgsnap")
    plain, ours = (len(containerd.snapshots(name, namespace="k8s.io")) for name in names)
    return plain, ours
