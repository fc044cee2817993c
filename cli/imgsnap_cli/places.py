"""From what the user typed to an open repository; the registry flags that go with it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from imgsnap.errors import InvalidArgument, InvalidReference
from imgsnap.units import parse_size
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.node_cache import NodeCache
    from imgsnap.blockstore.read_options import ReadOptions
    from imgsnap.blockstore.reader import BlockReader
    from imgsnap.blockstore.resolve import Admit
    from imgsnap.blockstore.snapshot import Snapshot
    from imgsnap.formats.snapshot_config import SnapshotConfig
    from imgsnap.node.request import AttachRequest
    from imgsnap.node.source import Source
    from imgsnap.node.targets import MountOptions
    from imgsnap.oci.locate import RegistryOptions
    from imgsnap.oci.reference import Location
    from imgsnap.oci.repository import Platform, Repository, WritableRepository

F = TypeVar("F", bound=Callable[..., Any])

_FLAGS = (
    click.option("--plain-http", is_flag=True, help="Speak http, not https"),
    click.option("--insecure", is_flag=True, help="Do not verify TLS certificates"),
    click.option("--ca-file", metavar="FILE", type=click.Path(), help="Trust these CAs"),
    click.option("--cert-file", metavar="FILE", type=click.Path(), help="Client certificate"),
    click.option("--key-file", metavar="FILE", type=click.Path(), help="Its key"),
    click.option("--registry-config", metavar="FILE", type=click.Path(), help="Credentials"),
    click.option("--hosts-dir", metavar="DIR", type=click.Path(), help="Of hosts.toml files"),
    click.option("-H", "--header", "headers", metavar="K:V", multiple=True, help="Extra header"),
)

boot_pack_option = click.option(
    "--boot-pack", metavar="NAME", help="To start from; none for none [the image's own]"
)


def boot_pack_names(name: str | None, preferred: str | None = None) -> tuple[str, ...]:
    """What the loader takes: names by preference. Raises InvalidArgument."""
    from imgsnap.blockstore.boot_choice import AUTO, check_name

    if name == "none":
        return ()
    if name is not None:
        return (check_name(name),)
    return (preferred, AUTO) if preferred else (AUTO,)


def _take_policy(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    """The flag goes where the variable is."""
    if value is not None:
        ctx.obj = replace(ctx.obj, policy=value.absolute())


policy_option = click.option(
    "--policy",
    metavar="FILE",
    type=click.Path(path_type=Path),
    expose_value=False,
    callback=_take_policy,
    help="Whose signatures it needs [IMGSNAP_POLICY]",
)

platform_option = click.option("--platform", metavar="OS/ARCH", help="Of an index [this machine's]")


_READING = (
    click.option(
        "--prefetch",
        type=click.Choice(["off", "pack", "all"]),
        default="pack",
        show_default=True,
        help="What to fetch before it is read",
    ),
    click.option("--prefetch-rate", metavar="SIZE", help="Per second, in the background"),
)


def reading_flags(function: F) -> F:
    """Adds what can be said about how a mount fetches; for `Places.mount_arguments`."""
    for option in reversed(_READING):
        function = option(function)
    return function


def reading(
    boot_pack: tuple[str, ...],
    prefetch: str = "off",
    prefetch_rate: str | None = None,
    *,
    image_config: bool = False,
    exact: bool = False,
) -> "ReadOptions":
    """The flags as the library has them. Raises InvalidArgument."""
    from imgsnap.blockstore.read_options import ReadOptions

    return ReadOptions(
        prefetch=prefetch,
        prefetch_rate=_rate(prefetch_rate),
        boot_pack=boot_pack,
        image_config=image_config,
        exact=exact,
    )


def registry_flags(function: F) -> F:
    """Adds the registry flags; the command hands them to `Places` as they come."""
    for option in reversed(_FLAGS):
        function = option(function)
    return function


class Places:
    """Opens what references name; everything opened is closed with the given stack."""

    def __init__(self, settings: Settings, flags: dict[str, Any]) -> None:
        self._settings = settings
        self._flags = flags

    def reader(self, stack: ExitStack, text: str) -> "tuple[Repository, str]":
        """The repository of a reference and its tag or digest."""
        from imgsnap.oci.reference import parse_location

        # Absolute: policies and the node cache know a layout by its name.
        repository, reference = self._open(_absolute(parse_location(text)), create=False)
        stack.enter_context(closing(repository))
        return repository, reference

    def repository(self, stack: ExitStack, text: str) -> "Repository":
        """The repository alone: a layout that holds many images needs no name here."""
        from imgsnap.oci.reference import DEFAULT_TAG, LayoutLocation, parse_location

        location = parse_location(text)
        if isinstance(location, LayoutLocation) and location.tag is None:
            location = replace(location, tag=DEFAULT_TAG)
        repository, _ = self._open(location, create=False)
        stack.enter_context(closing(repository))
        return repository

    def writer(self, stack: ExitStack, text: str) -> "tuple[WritableRepository, str]":
        """As `reader`, for a place to store under a tag; a missing layout is made.

        Raises InvalidReference for an archive or a digest: neither can be written to.
        """
        from imgsnap.oci import reference

        location = reference.parse_location(text)
        writable = (
            reference.RegistryLocation,
            reference.StoreLocation,
            reference.LayoutLocation,
        )
        if not isinstance(location, writable) or location.digest is not None:
            raise InvalidReference(
                f"{text!r} cannot be written to",
                hint="a target is REGISTRY/REPOSITORY[:TAG], store:NAME[:TAG] or oci:DIR[:TAG]",
            )
        repository, tag = self._open(location, create=True)
        stack.enter_context(closing(repository))
        return cast("WritableRepository", repository), tag

    def updater(self, stack: ExitStack, text: str) -> "tuple[WritableRepository, str]":
        """As `reader`, for a place to which something is added beside what the reference names.

        Raises InvalidReference for an archive.
        """
        from imgsnap.oci import reference

        location = reference.parse_location(text)
        if isinstance(location, reference.OciArchiveLocation | reference.DockerArchiveLocation):
            raise InvalidReference(
                f"{text!r} cannot be written to", hint="use a registry, store:NAME or oci:DIR"
            )
        repository, named = self._open(location, create=False)
        stack.enter_context(closing(repository))
        return cast("WritableRepository", repository), named

    def _open(self, location: "Location", *, create: bool) -> "tuple[Repository, str]":
        from imgsnap.oci.locate import open_repository

        return open_repository(
            location,
            self.registry_options(),
            store=self._settings.store,
            environ=self._settings.environ,
            create=create,
        )

    def registry_options(self) -> "RegistryOptions":
        """The registry flags as the library has them. Raises InvalidArgument."""
        from imgsnap.oci.locate import RegistryOptions, parse_headers

        flags = dict(self._flags)
        headers = parse_headers(flags.pop("headers"))
        for name in ("ca_file", "cert_file", "key_file", "registry_config"):
            flags[name] = Path(flags[name]).absolute() if flags[name] else None
        hosts_dir = flags.pop("hosts_dir")
        flags["hosts_dir"] = Path(hosts_dir).absolute() if hosts_dir else self._settings.hosts
        options = RegistryOptions(headers=headers, **flags)
        options.connection_options()  # refused here, where the user sees it at once
        return options

    def snapshot(self, stack: ExitStack, text: str, platform: str | None) -> "Snapshot":
        """The snapshot that a reference names, through the node cache, if the policy accepts it."""
        return self._snapshot(stack, text, platform, None, self.admission())

    def any_snapshot(
        self, stack: ExitStack, text: str, platform: str | None, digest: str | None = None
    ) -> "Snapshot":
        """As `snapshot`, whoever signed it: to look at, not to use. With `digest` the one that has
        it, whatever the reference names by now."""
        from imgsnap.blockstore.resolve import admit_all

        return self._snapshot(stack, text, platform, digest, admit_all)

    def _snapshot(
        self,
        stack: ExitStack,
        text: str,
        platform: str | None,
        digest: str | None,
        admit: "Admit",
    ) -> "Snapshot":
        from imgsnap.blockstore.snapshot import open_snapshot

        repository, reference = self.reader(stack, text)
        cache = node_cache(self._settings)
        found, wanted = digest or reference, _platform(platform)
        snapshot = open_snapshot(repository, found, cache, platform=wanted, admit=admit)
        stack.callback(snapshot.close)
        return snapshot

    def admission(self) -> "Admit":
        """Who lets snapshots be opened by this process. Raises what reading the policy raises."""
        from imgsnap.node.policies import admission

        return admission(self._policies(), node_cache(self._settings))

    def _policies(self) -> tuple[str, ...]:
        if self._settings.policy is None:
            return ()
        from imgsnap.node.policies import policy_text

        return (policy_text(self._settings.policy),)

    def mount_arguments(
        self,
        text: str,
        target: Path,
        platform: str | None,
        read_write: bool,
        read: "ReadOptions | None" = None,
    ) -> "tuple[MountOptions, Callable[[Source], Repository]]":
        """For `mount`: the repository is opened in the block server's process."""
        from imgsnap.blockstore.boot_choice import AUTO
        from imgsnap.blockstore.read_options import ReadOptions
        from imgsnap.node.targets import MountOptions

        options = MountOptions(
            self.attach_request(text, platform, read or ReadOptions(boot_pack=(AUTO,))),
            target,
            run_dir=self._settings.run,
            cache_dir=self._settings.cache,
            read_write=read_write,
            cache_quota=quota(self._settings),
        )
        return options, lambda found: found.open(self._settings.environ)

    def attach_request(
        self, text: str, platform: str | None, read: "ReadOptions"
    ) -> "AttachRequest":
        """For any process of this machine."""
        from imgsnap.node.request import AttachRequest
        from imgsnap.node.source import Source
        from imgsnap.oci.locate import reference_of
        from imgsnap.oci.reference import parse_location

        location = parse_location(text)
        source = Source(
            _lasting(location),
            self._settings.store,
            self.registry_options(),
            Source.kept_environ(self._settings.environ),
        )
        reference = reference_of(location)
        return AttachRequest(source, reference, _platform(platform), read, self._policies())

    def attach(
        self, text: str, platform: str | None, read: "ReadOptions", **how: Any
    ) -> dict[str, Any]:
        """Has the node daemon attach a snapshot; `how` as `imgsnap.node.client.attach` has it."""
        from imgsnap.node.client import attach

        settings = self._settings
        request = self.attach_request(text, platform, read)
        return attach(
            request,
            settings.run,
            settings.cache,
            cache_quota=quota(settings),
            policy=settings.policy,
            **how,
        )

    def image_config(
        self, stack: ExitStack, text: str, digest: str
    ) -> "tuple[SnapshotConfig, bytes]":
        """The config of the snapshot with this digest, and that of its image."""
        from imgsnap.blockstore.snapshot import open_snapshot, read_image_config

        repository, _ = self.reader(stack, text)
        cache = node_cache(self._settings)
        snapshot = open_snapshot(repository, digest, cache)
        stack.callback(snapshot.close)
        return snapshot.config, read_image_config(snapshot, cache)

    @contextmanager
    def block_reader(self, snapshot: "Snapshot") -> "Iterator[BlockReader]":
        """Reads of a snapshot's device, fetching what the node cache lacks."""
        from imgsnap.blockstore.attach import attach_reader

        with attach_reader(snapshot, node_cache(self._settings)) as reader:
            yield reader

    def chunk_index_path(self, text: str) -> Path:
        """Where the chunk index of a target is kept: with a layout, else in the node cache."""
        from imgsnap.oci.reference import LayoutLocation, RegistryLocation, parse_location

        location = parse_location(text)
        if isinstance(location, RegistryLocation):
            name = f"{location.registry}/{location.repository}"
            digest = hashlib.sha256(name.encode()).hexdigest()[:32]
            return self._settings.cache / "chunk-index" / digest
        root = location.path if isinstance(location, LayoutLocation) else self._settings.store
        return root / "imgsnap" / "chunk-index"


def node_cache(settings: Settings) -> "NodeCache":
    """The node's cache, with the quota that was given. Raises InvalidArgument."""
    from imgsnap.blockstore.node_cache import NodeCache

    return NodeCache(settings.cache, quota=quota(settings))


def quota(settings: Settings) -> int | None:
    """The cache's quota that was given, in bytes. Raises InvalidArgument."""
    if settings.cache_quota is None:
        return None
    from imgsnap.blockstore.cache_quota import parse_quota

    return parse_quota(settings.cache_quota)


def _lasting(location: "Location") -> str:
    """The location as any process may read it, whatever its working directory is."""
    return str(_absolute(location))


def _absolute(location: "Location") -> "Location":
    from imgsnap.oci.reference import RegistryLocation, StoreLocation

    if isinstance(location, RegistryLocation | StoreLocation):
        return location
    return replace(location, path=location.path.absolute())


def _rate(text: str | None) -> int:
    """Bytes per second; 0 for no limit. Raises InvalidArgument."""
    if text is None:
        return 0
    try:
        rate = parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise InvalidArgument(f"--prefetch-rate: {error}") from error
    if rate <= 0:
        raise InvalidArgument("--prefetch-rate: leave it out for no limit, or say --prefetch off")
    return rate


def _platform(text: str | None) -> "Platform | None":
    if text is None:
        return None
    from imgsnap.oci.platforms import parse_platform

    return parse_platform(text)
