"""imgsnap pull"""

from typing import Any

import click

from imgsnap_cli.copying import copy
from imgsnap_cli.places import registry_flags
from imgsnap_cli.progress import progress_option
from imgsnap_cli.settings import Settings


@click.command(short_help="Copy a snapshot from a registry to the local store")
@click.argument("ref")
@click.argument("name", required=False)
@progress_option
@registry_flags
@click.pass_obj
def command(settings: Settings, /, ref: str, name: str | None, progress: str, **flags: Any) -> None:
    """Copy the whole snapshot REF to the local store, as store:NAME.

    Without NAME it keeps the repository's own name and tag. To fill the node's cache instead, use
    `imgsnap warm`.
    """
    copy(settings, flags, ref, name or default_name(ref), progress)


def default_name(ref: str) -> str:
    """``registry.example/team/app:1.0`` becomes ``store:app:1.0``."""
    from imgsnap.errors import InvalidArgument
    from imgsnap.oci.reference import RegistryLocation, parse_location

    location = parse_location(ref)
    if not isinstance(location, RegistryLocation) or location.tag is None:
        raise InvalidArgument(
            f"{ref} has no repository and tag to take a name from",
            hint="give one: imgsnap pull REF store:NAME:TAG",
        )
    return f"store:{location.repository.rpartition('/')[2]}:{location.tag}"
