"""Opens the repository behind a location."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from imgsnap.errors import InvalidArgument
from imgsnap.oci.connections import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ConnectionOptions
from imgsnap.oci.reference import (
    DockerArchiveLocation,
    LayoutLocation,
    Location,
    OciArchiveLocation,
    RegistryLocation,
    StoreLocation,
)
from imgsnap.oci.repository import Repository
from imgsnap.oci.retry import RetryPolicy

if TYPE_CHECKING:
    from imgsnap.oci.local_reader import LocalReader

# Each kind of repository is imported where it is opened: a mount pays for one of them only.


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """Everything a user can say about reaching registries. Times in seconds."""

    plain_http: bool = False
    insecure: bool = False
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    headers: tuple[tuple[str, str], ...] = ()
    registry_config: Path | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    hosts_dir: Path | None = None  # of hosts.toml files, one directory per registry
    pod_credentials: Path | None = None  # asked before all others; may be missing

    def connection_options(self) -> ConnectionOptions:
        """The part that concerns connections. Raises InvalidArgument when it is contradictory."""
        if self.key_file is not None and self.cert_file is None:
            raise InvalidArgument("--key-file without --cert-file")
        return ConnectionOptions(
            plain_http=self.plain_http,
            insecure=self.insecure,
            ca_file=self.ca_file,
            client_pairs=((self.cert_file, self.key_file),) if self.cert_file else (),
            headers=self.headers,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
        )


def parse_headers(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Extra headers from ``NAME: VALUE`` texts. Raises InvalidArgument for one without a colon."""
    headers = []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise InvalidArgument(f"header {text[:100]!r} is not NAME:VALUE")
        headers.append((name.strip(), value.strip()))
    return tuple(headers)


def open_repository(
    location: Location,
    options: RegistryOptions,
    *,
    store: Path,
    environ: Mapping[str, str],
    create: bool = False,
) -> tuple[Repository, str]:
    """The repository behind a location, and the tag or digest to ask it for.

    `store` is the local store's layout directory; `environ` is the only environment looked at.
    `create` makes a missing layout or store, returns a WritableRepository, and takes a missing
    tag as "latest"; without it a layout or archive that holds a single image needs no tag.

    Raises NotFound, InvalidReference for several images and no tag, InvalidArgument for
    `create` with an archive. The caller closes the repository.
    """
    if isinstance(location, RegistryLocation):
        from imgsnap.oci.mirrors import open_registry

        opened = open_registry(location, options, environ, writable=create)
        return opened, location.reference
    from imgsnap.oci.layout import LayoutRepository

    match location:
        case StoreLocation():
            return LayoutRepository(store, create=create), location.reference
        case LayoutLocation() if create:
            return LayoutRepository(location.path, create=True), location.reference
    if create:
        raise InvalidArgument(
            f"{location}: archives can only be read",
            hint="write to oci:DIR:TAG and make the archive with skopeo",
        )
    return _open_local(location)


def repository_name(location: Location, store: Path) -> str:
    """The `name` that the opened repository would have; nothing is imported or read for it."""
    match location:
        case RegistryLocation():
            return f"{location.registry}/{location.repository}"
        case StoreLocation():
            return f"oci:{store}"
        case LayoutLocation():
            return f"oci:{location.path}"
        case OciArchiveLocation():
            return f"oci-archive:{location.path}"
        case DockerArchiveLocation():
            return f"docker-archive:{location.path}"


def reference_of(location: Location) -> str:
    """The tag or digest that open_repository would return with the repository.

    Looks into a layout or archive that is named without a tag; see open_repository for errors.
    """
    if isinstance(location, RegistryLocation | StoreLocation):
        return location.reference
    if location != type(location)(location.path):
        return location.reference
    repository, reference = _open_local(location)
    repository.close()
    return reference


def _open_local(
    location: LayoutLocation | OciArchiveLocation | DockerArchiveLocation,
) -> "tuple[LocalReader, str]":
    from imgsnap.oci.archive import DockerArchiveRepository, OciArchiveRepository
    from imgsnap.oci.layout import LayoutRepository

    repository: LocalReader
    named: str | None
    match location:
        case LayoutLocation():
            repository = LayoutRepository(location.path)
            named = location.digest or location.tag
        case OciArchiveLocation():
            repository = OciArchiveRepository(location.path)
            named = location.tag
        case DockerArchiveLocation():
            repository = DockerArchiveRepository(location.path)
            named = location.name
    try:
        return repository, named or repository.default_reference()
    except BaseException:
        repository.close()
        raise
