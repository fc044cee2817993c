"""Opens the repository behind a location."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.errors import InvalidArgument
from imgsnap.oci.archive import DockerArchiveRepository, OciArchiveRepository
from imgsnap.oci.auth import Authenticator
from imgsnap.oci.connections import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, ConnectionOptions
from imgsnap.oci.credentials import CredentialSource
from imgsnap.oci.http_message import TransportStats
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.local_reader import LocalReader
from imgsnap.oci.reference import (
    DockerArchiveLocation,
    LayoutLocation,
    Location,
    OciArchiveLocation,
    RegistryLocation,
    StoreLocation,
)
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.repository import Repository, WritableRepository
from imgsnap.oci.retry import RetryPolicy
from imgsnap.oci.transport import Transport


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

    def connection_options(self) -> ConnectionOptions:
        """The part that concerns connections. Raises InvalidArgument when it is contradictory."""
        return ConnectionOptions(
            plain_http=self.plain_http,
            insecure=self.insecure,
            ca_file=self.ca_file,
            cert_file=self.cert_file,
            key_file=self.key_file,
            headers=self.headers,
            connect_timeout_s=self.connect_timeout_s,
            read_timeout_s=self.read_timeout_s,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """An open repository and what to ask it for."""

    repository: Repository
    reference: str

    @property
    def writable(self) -> WritableRepository:
        """The repository for writing. Raises InvalidArgument for an archive."""
        if isinstance(self.repository, LayoutRepository | RegistryRepository):
            return self.repository
        raise InvalidArgument(
            f"{self.repository.name} can only be read",
            hint="write to oci:DIR:TAG and make the archive with skopeo",
        )


class RepositoryOpener:
    """Opens locations; repositories of one registry share connections and tokens.

    Sharing is what lets mount_blob work across repositories without a second login. Thread safe.
    `store` is the local store's layout directory; `environ` is the only environment looked at.
    """

    def __init__(
        self, options: RegistryOptions, *, store: Path, environ: Mapping[str, str]
    ) -> None:
        self.stats = TransportStats()
        self._options = options
        self._store = store
        self._environ = dict(environ)
        self._lock = threading.Lock()
        self._transports: dict[str, Transport] = {}
        credentials = CredentialSource(self._environ, options.registry_config)
        self._authenticator = Authenticator(credentials, clock=options.retry.clock)

    def open(self, location: Location, *, create: bool = False) -> Opened:
        """The repository with the reference to ask for.

        `create` makes a missing layout or store, and takes a missing tag as "latest"; without
        it a layout or archive that holds a single image needs no tag. Raises NotFound,
        InvalidReference, InvalidArgument (`create` of an archive).
        """
        match location:
            case RegistryLocation():
                transport = self._transport(location.registry)
                repository = RegistryRepository(transport, location.repository)
                return Opened(repository, location.reference)
            case StoreLocation():
                store = LayoutRepository(self._store, create=create, verify=True)
                return Opened(store, location.reference)
            case LayoutLocation():
                layout = LayoutRepository(location.path, create=create)
                named = create or location.tag is not None or location.digest is not None
                return _with_reference(layout, location.reference if named else None)
        if create:
            raise InvalidArgument(
                f"{location}: archives can only be read",
                hint="write to oci:DIR:TAG and make the archive with skopeo",
            )
        if isinstance(location, OciArchiveLocation):
            return _with_reference(OciArchiveRepository(location.path), location.tag)
        return _with_reference(_docker_archive(location), location.name)

    def close(self) -> None:
        """Closes the shared connections."""
        with self._lock:
            transports, self._transports = list(self._transports.values()), {}
        for transport in transports:
            transport.close()

    def _transport(self, registry: str) -> Transport:
        with self._lock:
            if registry not in self._transports:
                self._transports[registry] = Transport(
                    registry,
                    self._authenticator,
                    self._options.connection_options(),
                    environ=self._environ,
                    retry=self._options.retry,
                    stats=self.stats,
                )
            return self._transports[registry]


def open_repository(
    location: Location,
    options: RegistryOptions,
    *,
    store: Path,
    environ: Mapping[str, str],
    create: bool = False,
) -> Opened:
    """Opens one location by itself; see RepositoryOpener.open.

    For two locations that may be on one registry use a RepositoryOpener.
    """
    return RepositoryOpener(options, store=store, environ=environ).open(location, create=create)


def _docker_archive(location: DockerArchiveLocation) -> DockerArchiveRepository:
    return DockerArchiveRepository(location.path)


def _with_reference(repository: LocalReader, reference: str | None) -> Opened:
    try:
        return Opened(repository, reference or repository.default_reference())
    except BaseException:
        repository.close()
        raise
