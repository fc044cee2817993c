"""imgsnap config"""

from pathlib import Path

import click

from imgsnap_cli.settings import SYSTEM_STATE, Settings


@click.group(short_help="Print configuration for other programs")
def command() -> None:
    """Print configuration for other programs."""


@command.command("containerd")
@click.option("--version", "text", metavar="VERSION", help="1.6, 1.7 or 2.x [the running one's]")
@click.option("--address", metavar="SOCKET", help="The snapshotter's [RUN_DIR/snapshotter.sock]")
@click.option("--root", metavar="DIR", help="Of the snapshotter [/var/lib/imgsnap/snapshotter]")
@click.option("--containerd", metavar="SOCKET", help="To ask for the version [CONTAINERD_ADDRESS]")
@click.option("--platform", metavar="OS/ARCH", help="To unpack images for [this machine's]")
@click.pass_obj
def containerd(
    settings: Settings,
    text: str | None,
    address: str | None,
    root: str | None,
    containerd: str | None,
    platform: str | None,
) -> None:
    """Print what containerd's config.toml needs to use imgsnap's snapshotter.

    Tables that are there already are to be merged by hand: see docs/containerd.md on imports.
    """
    from imgsnap.containerd import config
    from imgsnap.oci.platforms import host_platform, parse_platform

    if text is not None:
        version, whose = config.parse_version(text), f"containerd {text}"
    else:
        socket = Path(containerd).absolute() if containerd else settings.containerd
        version, whose = config.installed_version(socket)
    chosen = parse_platform(platform) if platform else host_platform()
    toml = config.snippet(
        version,
        Path(address) if address else settings.snapshotter,
        Path(root) if root else SYSTEM_STATE / "snapshotter",
        str(chosen),
    )
    click.echo(f"# {config.CONFIG_FILE} for {whose}\n{toml}", nl=False)
