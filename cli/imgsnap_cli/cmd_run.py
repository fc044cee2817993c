"""imgsnap run"""

import os
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from imgsnap.errors import Unsupported
from imgsnap_cli.places import Places, platform_option, registry_flags
from imgsnap_cli.settings import Settings


@click.command(
    short_help="Run a command with a snapshot as its root",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("ref")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@platform_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings, /, ref: str, cmd: tuple[str, ...], platform: str | None, **flags: Any
) -> int:
    """Run the command of the image behind REF, or CMD after --, in a writable view of it.

    Environment, working directory and user are the image's; changes are dropped at the end. The
    command runs in a runc container with the host's network, or without runc in namespaces made
    by unshare. The exit code is the command's.
    """
    from imgsnap.mount import container
    from imgsnap.node.client import mount, unmount
    from imgsnap.oci.image_config import parse_run_config

    places = Places(settings, flags)
    settings.run.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        bundle = Path(stack.enter_context(TemporaryDirectory(dir=settings.run, prefix="run-")))
        root = bundle / "rootfs"
        root.mkdir()
        record = mount(*places.mount_arguments(ref, root, platform, True))
        stack.callback(unmount, root, settings.run, settings.cache)
        config, image_config = places.image_config(stack, ref, record.manifest_digest)
        if not container.supported_architecture(config.architecture):
            raise Unsupported(
                f"the image is for {config.architecture}; this machine is {os.uname().machine}"
            )
        resolved = container.resolve_command(
            root, parse_run_config(image_config), cmd, terminal=_on_terminal()
        )
        return container.run(root, resolved, bundle, f"imgsnap-{secrets.token_hex(6)}")


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
