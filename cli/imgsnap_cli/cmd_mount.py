"""imgsnap mount"""

from pathlib import Path
from typing import Any

import click

from imgsnap_cli.output import format_option, print_json
from imgsnap_cli.places import (
    Places,
    boot_pack_names,
    boot_pack_option,
    platform_option,
    policy_option,
    reading,
    reading_flags,
    registry_flags,
)
from imgsnap_cli.settings import Settings


@click.command(short_help="Mount a snapshot on a directory")
@click.argument("ref")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--rw", is_flag=True, help="Writable; changes are dropped by umount")
@boot_pack_option
@platform_option
@reading_flags
@format_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    directory: Path,
    rw: bool,
    boot_pack: str | None,
    platform: str | None,
    prefetch: str,
    prefetch_rate: str | None,
    format_: str,
    **flags: Any,
) -> None:
    """Mount the snapshot REF on DIRECTORY; returns when its tree is usable.

    REF may name the snapshot, or an image that has one. What is read is fetched and cached; a
    block server runs until `imgsnap umount DIRECTORY`.

    --prefetch all fetches the rest in the background as soon as a read had to wait; pack does so
    once most of the snapshot has been read; off never.
    """
    from imgsnap.node.client import mount

    places = Places(settings, flags)
    read = reading(boot_pack_names(boot_pack), prefetch, prefetch_rate)
    record = mount(*places.mount_arguments(ref, directory, platform, rw, read))
    if format_ == "json":
        print_json({"target": record.target, "digest": record.manifest_digest})
