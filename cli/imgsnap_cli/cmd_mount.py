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
    registry_flags,
)
from imgsnap_cli.settings import Settings


@click.command(short_help="Mount a snapshot on a directory")
@click.argument("ref")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--rw", is_flag=True, help="Writable; changes are dropped by umount")
@boot_pack_option
@platform_option
@format_option
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
    format_: str,
    **flags: Any,
) -> None:
    """Mount the snapshot REF on DIRECTORY; returns when its tree is usable.

    REF may name the snapshot, or an image that has one. What is read is fetched and cached; a
    block server runs until `imgsnap umount DIRECTORY`.
    """
    from imgsnap.mount.session import mount_snapshot

    places = Places(settings, flags)
    names = boot_pack_names(boot_pack)
    record = mount_snapshot(*places.mount_arguments(ref, directory, platform, rw, boot_pack=names))
    if format_ == "json":
        print_json({"target": record.target, "digest": record.manifest_digest})
