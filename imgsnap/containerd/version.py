"""The version of a running containerd."""

from pathlib import Path

from google.protobuf import empty_pb2

from imgsnap.containerd.api.services.version.v1.version_pb2_grpc import VersionStub
from imgsnap.containerd.connection import connect, errors_of


def server_version(socket: Path, *, timeout: float) -> str:
    """As it says it, such as ``1.6.20~ds1`` or ``v2.1.9``.

    Raises Unavailable when nothing answers, or another ImgsnapError.
    """
    with connect(socket, timeout=timeout) as channel, errors_of(f"containerd on {socket}"):
        return str(VersionStub(channel).Version(empty_pb2.Empty()).version)
