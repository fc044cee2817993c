"""Pulls an image that has a snapshot into containerd, without its layers, through containerd's API.

What a client that knows remote snapshots does, for those that do not: `ctr` of 1.x and other local
pulls. A lease keeps all of it from the garbage collector until the image refers to it.
"""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgsnap.containerd.api.services.content.v1 import content_pb2, content_pb2_grpc
from imgsnap.containerd.api.services.images.v1 import images_pb2, images_pb2_grpc
from imgsnap.containerd.api.services.leases.v1 import leases_pb2, leases_pb2_grpc
from imgsnap.containerd.api.services.snapshots.v1 import snapshots_pb2, snapshots_pb2_grpc
from imgsnap.containerd.config import PLUGIN, SOCKET
from imgsnap.containerd.connection import connect, errors_of
from imgsnap.errors import AlreadyExists, InvalidArgument, NotFound
from imgsnap.snapshotter.pulled_image import Content, PulledImage

TIMEOUT_S = 300.0
"""For one call: the snapshotter's Prepare may look for a snapshot, open and mount it."""
_LEASE_S = 24 * 3600
"""Until containerd forgets the lease of a pull that was killed."""


@dataclass(frozen=True, slots=True)
class Containerd:
    """Which containerd, and whose images of it."""

    address: Path = SOCKET
    namespace: str = "default"
    snapshotter: str = PLUGIN
    token: str = field(default_factory=lambda: secrets.token_hex(8))  # of the names of one pull


def pull(image: PulledImage, containerd: Containerd) -> None:
    """Afterwards containerd has the image, all but its layers, and their containerd snapshots.

    Raises NotFound when the snapshotter does not take the image, because it has no snapshot or
    none that can be had now; nothing is left behind then. Raises what containerd answers.
    """
    with _lease(containerd) as lease:
        place = containerd
        channel = connect(place.address, namespace=place.namespace, lease=lease, timeout=TIMEOUT_S)
        with channel:
            _claim(channel, image, containerd)
            for content in image.contents(containerd.snapshotter):
                _write(channel, content, containerd.token)
            _name(channel, image)


@contextmanager
def _lease(containerd: Containerd) -> Iterator[str]:
    """Given back with a garbage collection, so that what a failed pull left is gone."""
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _LEASE_S))
    place = connect(containerd.address, namespace=containerd.namespace, timeout=TIMEOUT_S)
    with place as channel:
        leases = leases_pb2_grpc.LeasesStub(channel)
        name = f"imgsnap-pull-{containerd.token}"
        request = leases_pb2.CreateRequest(id=name, labels={"containerd.io/gc.expire": expires})
        with errors_of(f"containerd on {containerd.address}"):
            leases.Create(request)
        try:
            yield name
        finally:
            with errors_of("giving back the lease"):
                leases.Delete(leases_pb2.DeleteRequest(id=name, sync=True))


def _claim(channel: Any, image: PulledImage, containerd: Containerd) -> None:
    """Asks the snapshotter for each layer; that it exists already is the wanted answer."""
    snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
    for number, chain_id in enumerate(image.chain):
        key = f"imgsnap-pull-{containerd.token} {chain_id}"
        request = snapshots_pb2.PrepareSnapshotRequest(
            snapshotter=containerd.snapshotter,
            key=key,
            parent=image.chain[number - 1] if number else "",
            labels=image.layer_labels(number),
        )
        try:
            with errors_of(f"the snapshotter {containerd.snapshotter}"):
                snapshots.Prepare(request)
        except AlreadyExists:
            continue
        except InvalidArgument as error:  # also when containerd knows no such snapshotter
            error.hint = "`imgsnap doctor` checks containerd's configuration"
            raise
        remove = snapshots_pb2.RemoveSnapshotRequest(snapshotter=containerd.snapshotter, key=key)
        with errors_of("removing what was prepared"):
            snapshots.Remove(remove)
        raise _no_snapshot(image, containerd)


def _no_snapshot(image: PulledImage, containerd: Containerd) -> NotFound:
    ordinary = f"ctr --namespace {containerd.namespace} images pull"
    return NotFound(
        f"{image.name} has no snapshot that can be had now",
        hint=f"convert it, or pull it as any image: {ordinary} "
        f"--snapshotter {containerd.snapshotter} {image.name}; the snapshotter's log says more",
    )


def _write(channel: Any, content: Content, token: str) -> None:
    """Writes a blob; one that is there already gets the labels, or the garbage collector would
    not see what it refers to."""
    stub = content_pb2_grpc.ContentStub(channel)
    request = content_pb2.WriteContentRequest(
        action=content_pb2.WriteAction.COMMIT,
        ref=f"imgsnap-pull-{token}-{content.digest}",
        total=len(content.data),
        expected=content.digest,
        data=content.data,
        labels=content.labels,
    )
    try:
        with errors_of(f"writing {content.digest}"):
            for _ in stub.Write(iter([request])):
                pass
    except AlreadyExists:
        update = content_pb2.UpdateRequest(
            info=content_pb2.Info(digest=content.digest, labels=content.labels)
        )
        update.update_mask.paths.extend(f"labels.{name}" for name in content.labels)
        with errors_of(f"labelling {content.digest}"):
            stub.Update(update)


def _name(channel: Any, image: PulledImage) -> None:
    """Makes the image, or lets its name stand for this one from now on."""
    images = images_pb2_grpc.ImagesStub(channel)
    made = images_pb2.Image(name=image.name)
    made.target.media_type = image.target.media_type
    made.target.digest = image.target.digest
    made.target.size = image.target.size
    try:
        with errors_of(f"naming the image {image.name}"):
            images.Create(images_pb2.CreateImageRequest(image=made))
    except AlreadyExists:
        update = images_pb2.UpdateImageRequest(image=made)
        update.update_mask.paths.append("target")
        with errors_of(f"renaming the image {image.name}"):
            images.Update(update)
