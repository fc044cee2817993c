"""imgsnap push"""

from typing import Any

import click

from imgsnap_cli.copying import copy
from imgsnap_cli.places import registry_flags
from imgsnap_cli.progress import progress_option
from imgsnap_cli.settings import Settings


@click.command(short_help="Copy a snapshot from the local store to a registry")
@click.argument("name")
@click.argument("target")
@progress_option
@registry_flags
@click.pass_obj
def command(settings: Settings, /, name: str, target: str, progress: str, **flags: Any) -> None:
    """Copy the snapshot store:NAME to TARGET; blobs that TARGET has are not sent again.

    \b
    imgsnap push store:app:1.0 registry.example/app:1.0-imgsnap
    """
    copy(settings, flags, name, target, progress)
