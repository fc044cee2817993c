"""CRI's image service, passed through to containerd: where a node's pulls show their credentials.

A kubelet with ``--image-service-endpoint`` (``imageServiceEndpoint``) sends its image calls here.
Messages are forwarded as bytes, so any version's calls and fields pass; only PullImageRequest is
looked at. Whatever goes wrong in looking costs the credentials, never the pull.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from imgsnap.containerd.api.cri.v1 import cri_pb2
from imgsnap.containerd.connection import MESSAGE_BYTES_MAX, connect, start_at
from imgsnap.errors import ImgsnapError, InvalidArgument
from imgsnap.oci.credentials import Credentials
from imgsnap.snapshotter.credentials import PodCredentials, parse_auth

SERVICE = "/runtime.v1.ImageService/"
PULL = f"{SERVICE}PullImage"
THREADS = 128
"""A pull holds one as long as it takes. They are not the snapshotter's: those pulls need it."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ImageService:
    """Where kubelets ask, which containerd answers, and who keeps the credentials."""

    address: Path
    containerd: Path
    credentials: PodCredentials


def start_image_service(service: ImageService) -> grpc.Server:
    """A running server. Raises InvalidArgument; see `start_at`."""
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="image-service"),
        handlers=[_Forwarder(connect(service.containerd), service.credentials)],
        options=[("grpc.max_receive_message_length", MESSAGE_BYTES_MAX), ("grpc.so_reuseport", 0)],
    )
    start_at(server, service.address)
    return server


class _Forwarder(grpc.GenericRpcHandler):
    """Every call is a stream to the one side and to the other: on the wire a unary call is one."""

    def __init__(self, channel: grpc.Channel, credentials: PodCredentials) -> None:
        self._channel = channel
        self._credentials = credentials

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if not details.method.startswith(SERVICE):
            return None
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._forward(details.method, requests, context)
        )

    def _forward(self, method: str, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        if method == PULL:
            requests = self._seen(requests)
        metadata = [
            (name, value)
            for name, value in context.invocation_metadata()
            if not name.startswith("grpc-") and name != "user-agent"
        ]
        call = self._channel.stream_stream(method)(
            requests, timeout=context.time_remaining(), metadata=metadata
        )
        context.add_callback(call.cancel)  # who does not wait any more ends the pull as well
        try:
            yield from call
        except grpc.RpcError:
            context.abort(call.code(), call.details())

    def _seen(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        for request in requests:
            self._look_at(request)
            yield request

    def _look_at(self, request: bytes) -> None:
        try:
            image, found = pulled_with(request)
            if found is not None:
                self._credentials.offer(image, found)
        except (ImgsnapError, OSError) as error:
            _log.warning("credentials of a pull are not kept: %s", error)
        except Exception:  # our defect is no reason to refuse a pull
            _log.exception("credentials of a pull are not kept")


def pulled_with(request: bytes) -> tuple[str, Credentials | None]:
    """The image and the credentials of a PullImageRequest. Raises InvalidArgument."""
    try:
        message = cri_pb2.PullImageRequest.FromString(request)
    except DecodeError as error:
        raise InvalidArgument(f"not a PullImageRequest: {error}") from error
    image, auth = message.image.image, message.auth
    return image, parse_auth(
        image,
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
    )
