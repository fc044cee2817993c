"""From what the user typed to an open repository; the registry flags that go with it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from imgsnap.errors import InvalidReference
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.reader import BlockReader
    from imgsnap.blockstore.snapshot import Snapshot
    from imgsnap.formats.snapshot_config import SnapshotConfig
    from imgsnap.mount.session import MountOptions
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
    click.option("-H", "--header", "headers", metavar="K:V", multiple=True, help="Extra header"),
)

platform_option = click.option("--platform", metavar="OS/ARCH", help="Of an index [this machine's]")


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

        repository, reference = self._open(parse_location(text), create=False)
        stack.enter_context(closing(repository))
        return repository, reference

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

    def _open(self, location: "Location", *, create: bool) -> "tuple[Repository, str]":
        from imgsnap.oci.locate import open_repository

        return open_repository(
            location,
            self._registry_options(),
            store=self._settings.store,
            environ=self._settings.environ,
            create=create,
        )

    def _platform(text: str | None) -> "Platform | None":
    if text is None:
        return None
    from imgsnap.oci.platforms import parse_platform

    return parse_platform(text)
