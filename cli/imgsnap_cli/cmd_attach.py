"""imgsnap attach"""

from pathlib import Path
from typing import Any

import click

from imgsnap.errors import InvalidArgument
from imgsnap_cli.attached import as_json
from imgsnap_cli.output import print_json
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

MAPPED = ("firecracker-pmem", "cloud-hypervisor-pmem")
"""As `imgsnap.vm.formats.MAPPED`."""
VMMS = ("qemu", "qemu-microvm", "firecracker", "cloud-hypervisor", *MAPPED, "kata")
"""As `imgsnap.vm.formats.FORMATS` has them."""
UBLK_ID_MAX = (1 << 20) - 1
"""Of a device's minor number."""


@click.command(short_help="Attach a snapshot as a block source for VMs")
@click.argument("ref")
@boot_pack_option
@platform_option
@reading_flags
@click.option(
    "--format",
    "format_",
    type=click.Choice(["path", "json", *VMMS]),
    default="path",
    show_default=True,
    help="What to print: a VMM's name for its options or API's JSON",
)
@click.option(
    "--via",
    type=click.Choice(["fuse", "ublk"]),
    default="fuse",
    show_default=True,
    help="A file, or a disk /dev/ublkbN where the kernel has ublk",
)
@click.option("--ublk-id", type=click.IntRange(0, UBLK_ID_MAX), help="N of the disk to make")
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    boot_pack: str | None,
    platform: str | None,
    prefetch: str,
    prefetch_rate: str | None,
    format_: str,
    via: str,
    ublk_id: int | None,
    **flags: Any,
) -> None:
    """Attach the snapshot REF: a read-only file or disk that any number of VMs use as their root.

    Bytes are fetched as they are read. The file's size is a multiple of 2 MiB. It stays until
    `imgsnap detach`; a node daemon serves it, and is started if none runs.
    """
    if ublk_id is not None and via != "ublk":
        raise InvalidArgument("--ublk-id is for --via ublk")
    if format_ in MAPPED and via == "ublk":
        raise InvalidArgument(f"{format_} maps a file, not a disk", hint="leave out --via ublk")
    places = Places(settings, flags)
    read = reading(boot_pack_names(boot_pack), prefetch, prefetch_rate)
    found = places.attach(ref, platform, read, via=via, number=ublk_id)
    if format_ in VMMS:
        from imgsnap.vm.formats import FORMATS

        click.echo(FORMATS[format_](Path(found["path"])))
    elif format_ == "path":
        click.echo(found["path"])
    else:
        print_json(as_json(found))
