"""imgsnap run"""

from contextlib import ExitStack
from typing import Any

import click

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
from imgsnap_cli.running import bundle_directory, mount_root, run_in_snapshot
from imgsnap_cli.settings import Settings


@click.command(
    short_help="Run a command with a snapshot as its root",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("ref")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@boot_pack_option
@platform_option
@reading_flags
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    cmd: tuple[str, ...],
    boot_pack: str | None,
    platform: str | None,
    prefetch: str,
    prefetch_rate: str | None,
    **flags: Any,
) -> int:
    """Run the command of the image behind REF, or CMD after --, in a writable view of it.

    Environment, working directory and user are the image's; changes are dropped at the end. The
    command runs in a runc container with the host's network, or without runc in namespaces made
    by unshare. The exit code is the command's. A boot pack named like the program of CMD is
    preferred to the image's own.
    """
    from imgsnap.blockstore.boot_choice import name_of_command

    names = boot_pack_names(boot_pack, name_of_command(cmd) if cmd else None)
    places = Places(settings, flags)
    with ExitStack() as stack:
        bundle = bundle_directory(stack, settings)
        read = reading(names, prefetch, prefetch_rate, image_config=True)
        root = mount_root(stack, settings, places, bundle, ref, platform, read)
        return run_in_snapshot(stack, places, root, ref, cmd)
