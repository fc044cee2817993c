"""Uploads to a registry: HEAD, POST, one streaming PUT. Never PATCH.

ECR drops every chunk after the first of a PATCH upload without a word, and Google's Artifact
Registry takes none at all; a single PUT with Content-Length works everywhere.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from imgsnap.digest import sha256_digest
from imgsnap.errors import (
    AccessDenied,
    DigestMismatch,
    ImgsnapError,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from imgsnap.oci.auth import Scope
from imgsnap.oci.http_errors import RegistryRejected, redact
from imgsnap.oci.http_message import Body, Request, Response
from imgsnap.oci.redirects import absolute_url
from imgsnap.oci.repository import Descriptor, RawManifest
from imgsnap.oci.retry import Attempts

if TYPE_CHECKING:
    from imgsnap.oci.registry import RegistryRepository

_CREATED = frozenset({200, 201, 202, 204})
"""201 by the specification; older servers and proxies answer with another success."""

_log = logging.getLogger(__name__)


def put_file(repository: "RegistryRepository", descriptor: Descriptor, path: Path) -> None:
    """Uploads a file as a blob. Raises InvalidArgument when its size is not the descriptor's."""
    size = path.stat().st_size
    if size != descriptor.size:
        raise InvalidArgument(f"{path} has {size} bytes, its descriptor says {descriptor.size}")
    _upload(repository, descriptor, Body.of_file(path, size))


def put_bytes(repository: "RegistryRepository", descriptor: Descriptor, data: bytes) -> None:
    """Uploads bytes as a blob. Raises DigestMismatch when they are not the descriptor's."""
    got = sha256_digest(data)
    if got != descriptor.digest or len(data) != descriptor.size:
        raise DigestMismatch(f"blob for {repository.name}", descriptor.digest, got)
    _upload(repository, descriptor, Body.of_bytes(data))


def mount(repository: "RegistryRepository", descriptor: Descriptor, source: str) -> bool:
    """Asks the registry to take a blob from its repository `source`; False when it will not.

    Every refusal is False: the caller then copies, and meets the reason if it matters.
    """
    scope = Scope.push(repository.scoped) | Scope.pull(source)
    query = urlencode({"mount": descriptor.digest, "from": source})
    request = Request(
        "POST", f"{repository.url('blobs', 'uploads/')}?{query}", scope, accept=_CREATED
    )
    try:
        status, location = repository.transport.exchange(request, _status_and_location)
    except (AccessDenied, NotFound, Unsupported, RegistryRejected) as error:
        _log.debug("no mount of %s from %s: %s", descriptor.digest, source, error)
        return False
    if status == 201:
        return True
    if location:  # 202 began an upload session instead, which would linger for days.
        with suppress(ImgsnapError):
            _cancel(repository, location)
    return False


def put_manifest(repository: "RegistryRepository", manifest: RawManifest, reference: str) -> bool:
    """Uploads a manifest under a tag or digest.

    Returns whether the registry says that it lists the manifest among its subject's referrers
    (the OCI-Subject header). Raises DigestMismatch when it stored something else.
    """
    descriptor = manifest.descriptor
    request = Request(
        "PUT",
        repository.url("manifests", reference),
        Scope.push(repository.scoped),
        headers={"Content-Type": descriptor.media_type},
        body=Body.of_bytes(manifest.raw),
        accept=_CREATED,
    )

    def consume(response: Response) -> bool:
        _check_stored(response, descriptor)
        return bool(response.headers.get("oci-subject"))

    return repository.transport.exchange(request, consume)


def _upload(repository: "RegistryRepository", descriptor: Descriptor, body: Body) -> None:
    """Tries sessions until one succeeds: an upload that broke off is begun anew, not resumed."""
    if repository.has_blob(descriptor):
        return
    attempts = Attempts(repository.transport.retry)
    while True:
        try:
            _put(repository, descriptor, body, _begin(repository))
            return
        except Unavailable as error:
            attempts.failed(error)
            repository.transport.stats.add("retries")


def _begin(repository: "RegistryRepository") -> str:
    """Opens an upload session and returns its URL."""
    request = Request(
        "POST",
        repository.url("blobs", "uploads/"),
        Scope.push(repository.scoped),
        accept=frozenset({202, 201, 200}),
    )
    _, location = repository.transport.exchange(request, _status_and_location)
    if not location:
        raise Unavailable(f"{repository.name}: the registry names no place to upload to")
    return repository.transport.resolve_upload(location, repository.transport.origin + "/")


def _put(
    repository: "RegistryRepository", descriptor: Descriptor, body: Body, session: str
) -> None:
    separator = "&" if "?" in session else "?"
    request = Request(
        "PUT",
        f"{session}{separator}{urlencode({'digest': descriptor.digest})}",
        Scope.push(repository.scoped),
        headers={"Content-Type": "application/octet-stream"},
        body=body,
        accept=_CREATED,
        retry=False,
    )
    repository.transport.exchange(request, lambda response: _check_stored(response, descriptor))


def _cancel(repository: "RegistryRepository", location: str) -> None:
    url = repository.transport.resolve_upload(location, repository.transport.origin + "/")
    request = Request("DELETE", url, Scope.push(repository.scoped), accept=_CREATED, retry=False)
    repository.transport.exchange(request, lambda response: response.read_up_to(65536))


def _check_stored(response: Response, descriptor: Descriptor) -> None:
    response.read_up_to(65536)  # So that the connection can be used again.
    stored = response.headers.get("docker-content-digest", "").strip()
    if stored.startswith("sha256:") and stored != descriptor.digest:
        raise DigestMismatch(f"upload to {redact(response.url)}", descriptor.digest, stored[:100])


def _status_and_location(response: Response) -> tuple[int, str]:
    response.read_up_to(65536)
    location = response.headers.get("location", "")
    if location and not location.startswith(("http://", "https://", "/")):
        # Relative to the request's own path, which the caller no longer knows.
        location = absolute_url(response.url, location) or location
    return response.status, location
