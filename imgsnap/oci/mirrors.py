"""A repository that several hosts serve: mirrors first, the registry itself last.

Everything but the meaning of a tag is checked by digest, so any host may be asked for it. Tags,
lists of tags and lists of referrers are believed from hosts with the capability "resolve" only. A
host that lacks something, is away or sends damaged bytes is asked after the others for a while.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from imgsnap.digest import Digest
from imgsnap.errors import ImgsnapError, NotFound, Unsupported
from imgsnap.oci.auth import Authenticator
from imgsnap.oci.cancellation import Cancellation, Cancelled
from imgsnap.oci.credentials import CredentialSource
from imgsnap.oci.hosts import Host, find_hosts
from imgsnap.oci.reference import DOCKER_HUB, DOCKER_HUB_WIRE, RegistryLocation
from imgsnap.oci.registry import RegistryRepository
from imgsnap.oci.repository import (
    ByteStream,
    Descriptor,
    RangeStream,
    RawManifest,
    Repository,
    check_range,
)
from imgsnap.oci.transport import Endpoint, Transport

if TYPE_CHECKING:
    from imgsnap.oci.locate import RegistryOptions

COOL_S = 10.0
"""How long a host that failed is asked last; doubles with each failure that follows …"""
COOL_MAX_S = 300.0
"""… up to this."""
MIRROR_ATTEMPTS = 2
"""Tries of one request at a mirror: the next host is nearer than the end of a backoff."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def open_registry(
    location: RegistryLocation,
    options: "RegistryOptions",
    environ: Mapping[str, str],
    *,
    writable: bool = False,
) -> Repository:
    """A registry's repository through the hosts that hosts.toml names for it, if it names any.

    What is written is written to the first host with the capability "push", and read there too.
    Raises InvalidArgument for a malformed hosts.toml, Unsupported when no host takes writes.
    """
    found = find_hosts(options.hosts_dir, location.registry) if options.hosts_dir else None
    credentials = CredentialSource(environ, options.registry_config, first=options.pod_credentials)

    def at(registry: str, endpoint: Endpoint | None, **settings: object) -> RegistryRepository:
        transport = Transport(
            registry,
            Authenticator(credentials, clock=options.retry.clock),
            environ=environ,
            endpoint=endpoint,
            **settings,  # type: ignore[arg-type]
        )
        return RegistryRepository(transport, location.repository, owns_transport=True)

    own = options.connection_options()
    if found is None:
        return at(location.registry, None, options=own, retry=options.retry)
    server = found.hosts[-1]
    wire = DOCKER_HUB_WIRE if location.registry == DOCKER_HUB else location.registry

    def open_host(host: Host) -> RegistryRepository:
        itself = host.host == wire
        registry = location.registry if itself else host.host
        namespace = "" if itself else location.registry
        settings = {"options": host.options, "retry": options.retry}
        if host is not server:
            settings["retry"] = replace(options.retry, attempts_max=MIRROR_ATTEMPTS)
        elif itself:  # the flags of the command line are about the registry that it names
            settings["options"] = own.over(host.options)
        return at(registry, Endpoint(host.host, host.api, namespace), **settings)

    if writable:
        pushed = [host for host in found.hosts if "push" in host.capabilities]
        if not pushed:
            raise Unsupported(f"{location}: hosts.toml names no host with the capability push")
        return open_host(pushed[0])
    usable = [host for host in found.hosts if host.capabilities & {"pull", "resolve"}]
    return MirroredRepository(
        f"{location.registry}/{location.repository}",
        [
            Member(
                open_host(host),
                host.host,
                pull="pull" in host.capabilities,
                resolve="resolve" in host.capabilities,
            )
            for host in usable
        ],
    )


@dataclass(frozen=True, slots=True)
class Member:
    """One host's repository and what it is believed in."""

    repository: Repository
    host: str
    pull: bool = True
    resolve: bool = True


class MirroredRepository:
    """Implements Repository over several, in the order of their tries. Thread safe.

    Raises what the last host raises, the registry itself, unless it was not asked.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[Member],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._members = tuple(members)
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = {member.host: 0 for member in members}
        self._cool_until = {member.host: 0.0 for member in members}

    @property
    def name(self) -> str:
        return self._name

    def expect(self, requests: int) -> None:
        """Of the host that is asked first."""
        with suppress(Unsupported):  # the requests will say it better
            self._order(resolve=False)[0].repository.expect(requests)

    # Reads -----------------------------------------------------------------------------------

    def manifest(self, reference: str) -> RawManifest:
        by_tag = ":" not in reference
        return self._first(lambda repository: repository.manifest(reference), resolve=by_tag)

    def blob(self, descriptor: Descriptor, *, size_max: int) -> bytes:
        return self._first(lambda repository: repository.blob(descriptor, size_max=size_max))

    @contextmanager
    def open_blob(self, descriptor: Descriptor) -> Iterator[ByteStream]:
        """As one host sends it: a transfer that this host cannot finish fails, and the next one
        goes elsewhere."""
        with ExitStack() as stack:
            streams: list[tuple[Member, ByteStream]] = []

            def enter(member: Member) -> None:
                stream = stack.enter_context(member.repository.open_blob(descriptor))
                streams.append((member, stream))

            self._try(self._order(resolve=False), enter)
            try:
                yield streams[0][1]
            except ImgsnapError as error:
                self._failed(streams[0][0], error)
                raise

    def read_range(self, descriptor: Descriptor, offset: int, length: int) -> bytes:
        with self.open_range(descriptor, offset, length) as stream:
            return stream.read(length)

    @contextmanager
    def open_range(
        self,
        descriptor: Descriptor,
        offset: int,
        length: int,
        *,
        cancellation: Cancellation | None = None,
        second: bool = False,
    ) -> Iterator[RangeStream]:
        """A range that goes on at the next host where one breaks off for good."""
        check_range(descriptor, offset, length)
        order = self._order(resolve=False)
        if second:
            order = [*order[1:], order[0]]
        stream = _MirroredRange(self, order, descriptor, offset, length, cancellation)
        try:
            yield stream
        finally:
            stream.close()

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether any of the hosts has it."""

        def ask(member: Member) -> None:
            if not member.repository.has_blob(descriptor):
                raise NotFound(f"{member.repository.name}: no blob {descriptor.digest}")

        try:
            self._try(self._order(resolve=False), ask, blame=False)
        except NotFound:
            return False
        return True

    def tags(self, prefix: str = "") -> list[str]:
        return self._first(lambda repository: repository.tags(prefix), resolve=True)

    def referrers(self, subject: Digest, artifact_type: str) -> list[Descriptor]:
        """The first list that is not empty: pull-through caches often lack referrers."""
        found: list[Descriptor] = []

        def ask(member: Member) -> None:
            found.extend(member.repository.referrers(subject, artifact_type))
            if not found:
                raise NotFound(f"{member.repository.name}: no referrers of {subject}")

        try:
            self._try(self._order(resolve=True), ask, blame=False)
        except NotFound:
            return []
        return found

    def close(self) -> None:
        for member in self._members:
            member.repository.close()

    # Order and blame -------------------------------------------------------------------------

    def _first(self, ask: Callable[[Repository], _T], *, resolve: bool = False) -> _T:
        answers: list[_T] = []
        self._try(
            self._order(resolve=resolve), lambda member: answers.append(ask(member.repository))
        )
        return answers[0]

    def _order(self, *, resolve: bool) -> list[Member]:
        """Who may be asked, hosts that failed lately last."""
        now = self._clock()
        able = [m for m in self._members if (m.resolve if resolve else m.pull)]
        if not able:
            raise Unsupported(
                f"{self._name}: hosts.toml names no host with the capability "
                f"{'resolve' if resolve else 'pull'}"
            )
        with self._lock:
            return sorted(able, key=lambda m: self._cool_until[m.host] > now)

    def _try(
        self,
        order: Sequence[Member],
        ask: Callable[[Member], None],
        *,
        blame: bool = True,
    ) -> Member:
        """The first member that answers."""
        errors: dict[str, ImgsnapError] = {}
        for member in order:
            try:
                ask(member)
            except Cancelled:
                raise
            except ImgsnapError as error:
                errors[member.host] = error
                if blame:
                    self._failed(member, error)
                continue
            if blame:
                self._served(member)
            return member
        raise errors.get(self._members[-1].host) or list(errors.values())[-1]

    def _failed(self, member: Member, error: ImgsnapError | None) -> None:
        """Has a host asked last for a while."""
        with self._lock:
            now = self._clock()
            if self._cool_until[member.host] > now:
                return  # it was asked last anyway, or several threads tell of one failure
            cool_s = min(COOL_S * 2 ** self._failures[member.host], COOL_MAX_S)
            self._failures[member.host] = min(self._failures[member.host] + 1, 16)
            self._cool_until[member.host] = now + cool_s
        if member is not self._members[-1]:
            _log.info(
                "%s is asked last for %g s: %s", member.host, cool_s, error or "damaged bytes"
            )

    def _served(self, member: Member) -> None:
        if self._failures[member.host]:
            with self._lock:
                self._failures[member.host] = 0
                self._cool_until[member.host] = 0.0


class _MirroredRange:
    """A RangeStream over hosts in order."""

    def __init__(
        self,
        mirrored: MirroredRepository,
        order: Sequence[Member],
        descriptor: Descriptor,
        offset: int,
        length: int,
        cancellation: Cancellation | None,
    ) -> None:
        self._mirrored = mirrored
        self._left = list(order)
        self._descriptor = descriptor
        self._offset = offset
        self._end = offset + length
        self._cancellation = cancellation
        self._stack = ExitStack()
        self._open()

    @property
    def host(self) -> str:
        return self._stream.host

    def read(self, size: int) -> bytes:
        parts = []
        left = min(size, self._end - self._offset)
        while left:
            try:
                data = self._stream.read(left)
            except Cancelled:
                raise
            except ImgsnapError as error:
                self._mirrored._failed(self._member, error)
                self.close()
                if not self._left:
                    raise
                self._open()
                continue
            if not data:
                break
            self._offset += len(data)
            left -= len(data)
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def reject(self) -> None:
        self._mirrored._failed(self._member, None)

    def close(self) -> None:
        self._stack.close()

    def _open(self) -> None:
        def enter(member: Member) -> None:
            self._left.remove(member)
            self._stream: RangeStream = self._stack.enter_context(
                member.repository.open_range(
                    self._descriptor,
                    self._offset,
                    self._end - self._offset,
                    cancellation=self._cancellation,
                )
            )

        self._member = self._mirrored._try(list(self._left), enter)
