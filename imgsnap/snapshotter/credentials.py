"""Registry credentials that kubelets send along with pulls, kept for the reads that come later.

A file in docker's format with one entry per repository, below the run directory (tmpfs, 0600): see
docs/adr/0012-registry-credentials.md. An entry is written only after the registry has accepted it,
so nobody can replace what works by what does not.
"""

import base64
import binascii
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from imgsnap.errors import FormatError, ImgsnapError, InvalidArgument
from imgsnap.oci.credentials import Credentials
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.manifest import parse_json_object
from imgsnap.oci.reference import RegistryLocation, parse_location
from imgsnap.oci.retry import RetryPolicy

FILE_NAME = "pod-credentials.json"
FILE_BYTES_MAX = 512 << 10
"""Half of what a reader of docker's format takes; the oldest entries go first."""
SECRET_BYTES_MAX = 32 << 10
"""Of all parts of one credential; a cloud's tokens have a few KiB."""
REFERENCE_BYTES_MAX = 4096
_CHECK_TIMEOUT_S = 5.0

Accepts = Callable[[RegistryLocation, Path], bool]
"""Whether the registry lets somebody with these credentials, a file in docker's format, read an
image. Never raises."""
_log = logging.getLogger(__name__)


class PodCredentials:
    """The file and who writes it: one object in one process. Thread safe."""

    def __init__(self, path: Path, accepts: Accepts) -> None:
        self._path = path
        self._accepts = accepts
        self._lock = threading.Lock()

    def offer(self, image: str, credentials: Credentials) -> bool:
        """Keeps the credentials for the image's repository if its registry accepts them.

        Returns whether they are kept now. Raises InvalidArgument for what is no image of a
        registry or too large, OSError when the file cannot be written.
        """
        location = _location(image)
        key = f"{location.registry}/{location.repository}"
        entry = _entry(credentials)
        if self._entries().get(key) == entry:
            return True
        offered = _write_beside(self._path, {key: entry})
        try:
            if not self._accepts(location, offered):
                return False
        finally:
            offered.unlink()
        with self._lock:
            entries = self._entries()
            entries.pop(key, None)
            entries[key] = entry  # the youngest is last
            _write_beside(self._path, _shortened(entries)).replace(self._path)
        return True

    def _entries(self) -> dict[str, Any]:
        try:
            raw = self._path.read_bytes()
            auths = parse_json_object(raw, record=str(self._path)).get("auths")
        except FileNotFoundError:
            return {}
        except FormatError as error:
            _log.warning("begun anew: %s", error)
            return {}
        return auths if isinstance(auths, dict) else {}


def registry_accepts(options: RegistryOptions, environ: dict[str, str]) -> Accepts:
    """Asks the registry itself, briefly, for the image's manifest."""
    brief = replace(
        options,
        connect_timeout_s=_CHECK_TIMEOUT_S,
        read_timeout_s=_CHECK_TIMEOUT_S,
        retry=RetryPolicy(attempts_max=1),
        pod_credentials=None,
    )

    def accepts(location: RegistryLocation, file: Path) -> bool:
        try:
            asked = replace(brief, registry_config=file)
            repository, reference = open_repository(
                location, asked, store=Path("/nonexistent"), environ=environ
            )
            with closing(repository):
                repository.manifest(reference)
        except ImgsnapError as error:
            _log.info("credentials for %s are not kept: %s", location, error)
            return False
        return True

    return accepts


def parse_auth(
    image: str,
    *,
    username: str = "",
    password: str = "",
    auth: str = "",
    server_address: str = "",
    identity_token: str = "",
) -> Credentials | None:
    """The fields of CRI's AuthConfig as containerd understands them (ParseAuth in its CRI plugin);
    None for none, for another registry than the image's, and for a bare registry token, which
    containerd does not use either. Raises InvalidArgument."""
    server = _host(server_address)
    if server and server not in (_location(image).host, _location(image).registry):
        return None
    if username:
        return Credentials(username, password)
    if identity_token:
        return Credentials(identity_token=identity_token)
    if not auth:
        return None
    try:
        name, colon, secret = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError) as error:
        raise InvalidArgument("auth is not base64 of USER:PASSWORD") from error
    if not colon:
        raise InvalidArgument("auth is not base64 of USER:PASSWORD")
    return Credentials(name, secret.rstrip("\0"))


def _location(image: str) -> RegistryLocation:
    """Kubelets send names as pods have them: without a registry they are Docker Hub's."""
    if len(image) > REFERENCE_BYTES_MAX:
        raise InvalidArgument(f"an image's name of {len(image)} bytes")
    location = parse_location(f"docker://{image}")
    if not isinstance(location, RegistryLocation):
        raise AssertionError("docker:// names registries only")
    return location


def _host(server: str) -> str:
    try:
        return urlsplit(server if "//" in server else f"//{server}").netloc
    except ValueError as error:
        raise InvalidArgument(f"{server[:100]!r} is no address of a registry") from error


def _entry(credentials: Credentials) -> dict[str, str]:
    if credentials.identity_token:
        entry = {"identitytoken": credentials.identity_token}
    else:
        entry = {"username": credentials.username, "password": credentials.password}
    size = sum(map(len, entry.values()))
    if size > SECRET_BYTES_MAX:
        raise InvalidArgument(f"credentials of {size} bytes; {SECRET_BYTES_MAX} at most")
    return entry


def _shortened(entries: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: len(json.dumps({key: entry})) for key, entry in entries.items()}
    total, kept = sum(sizes.values()), dict(entries)
    for key, size in sizes.items():
        if total <= FILE_BYTES_MAX:
            break
        total -= size
        del kept[key]
    return kept


def _write_beside(path: Path, entries: dict[str, Any]) -> Path:
    """A new file next to `path`, readable by its owner alone, to be renamed or removed."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(fd, "w") as file:
        json.dump({"auths": entries}, file)
    return Path(name)
