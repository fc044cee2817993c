"""imgsnap version"""

import platform
from importlib import metadata

import click

from imgsnap import __version__
from imgsnap_cli.output import format_option, print_json

_PARTS = ("blake3", "click", "isal", "rocksdict", "urllib3", "zstandard")


@click.command(short_help="Print versions")
@format_option
def command(format_: str) -> None:
    """Print the versions of imgsnap, of its formats and of the parts that matter to them."""
    parts = {name: metadata.version(name) for name in _PARTS}
    if format_ == "json":
        print_json(
            {
                "version": __version__,
                "format": 1,
                "python": platform.python_version(),
                "kernel": platform.release(),
                "packages": parts,
            }
        )
        return
    click.echo(f"imgsnap {__version__} (snapshot format 1)")
    click.echo(f"python {platform.python_version()}, kernel {platform.release()}")
    click.echo(", ".join(f"{name} {version}" for name, version in parts.items()))
