"""CRI calls to a real containerd, as a kubelet or crictl would make them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from imgsnap.containerd.api.cri.v1 import cri_pb2 as pb
from imgsnap.containerd.api.cri.v1.cri_pb2_grpc import ImageServiceStub, RuntimeServiceStub
from imgsnap.containerd.connection import connect

_TIMEOUT_S = 120.0
Pod = tuple[str, pb.PodSandboxConfig]


class Cri:
    """The calls that tests need; raises grpc.RpcError as it comes. `images` and `runtime` are the
    stubs, for other calls."""

    def __init__(self, images: ImageServiceStub, runtime: RuntimeServiceStub) -> None:
        self.images = images
        self.runtime = runtime

    def pull(self, reference: str, user: str = "", password: str = "") -> str:
        """The image's id; with credentials as a kubelet sends them."""
        auth = pb.AuthConfig(username=user, password=password) if user else None
        request = pb.PullImageRequest(image=pb.ImageSpec(image=reference), auth=auth)
        return self.images.PullImage(request).image_ref

    def has_image(self, reference: str) -> bool:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=reference))
        return self.images.ImageStatus(request).HasField("image")

    def remove_image(self, reference: str) -> None:
        self.images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=reference)))

    def run_pod(self, name: str, logs: Path) -> Pod:
        """A sandbox in the host's network, pid and ipc namespaces: its id and its config."""
        host = pb.NamespaceOption(network=pb.NODE, pid=pb.NODE, ipc=pb.NODE)
        security = pb.LinuxSandboxSecurityContext(namespace_options=host)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="test"),
            log_directory=str(logs),
            linux=pb.LinuxPodSandboxConfig(security_context=security),
        )
        answer = self.runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config))
        return answer.pod_sandbox_id, config

    def start(self, pod: Pod, name: str, image: str, *command: str) -> str:
        """A running container of an image; its output goes to `<logs of the pod>/<name>.log`."""
        sandbox, sandbox_config = pod
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            command=command,
            log_path=f"{name}.log",
        )
        request = pb.CreateContainerRequest(
            pod_sandbox_id=sandbox, config=config, sandbox_config=sandbox_config
        )
        container = self.runtime.CreateContainer(request).container_id
        self.runtime.StartContainer(pb.StartContainerRequest(container_id=container))
        return container

    def status(self, container: str) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=container)
        return self.runtime.ContainerStatus(request).status

    def remove_container(self, container: str) -> None:
        self.runtime.StopContainer(pb.StopContainerRequest(container_id=container))
        self.runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container))

    def remove_pod(self, pod: Pod) -> None:
        self.runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod[0]))
        self.runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod[0]))


@contextlib.contextmanager
def cri(socket: Path) -> Iterator[Cri]:
    """CRI on a socket: containerd's own, or a proxy of it."""
    with connect(socket, timeout=_TIMEOUT_S) as channel:
        yield Cri(ImageServiceStub(channel), RuntimeServiceStub(channel))
