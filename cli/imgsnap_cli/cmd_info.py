"""imgsnap info"""

import click

from imgsnap.units import format_size
from imgsnap_cli.attached import as_json, find_attached
from imgsnap_cli.output import format_option, print_json
from imgsnap_cli.settings import Settings


@click.command(short_help="Show an attached snapshot and who uses it")
@click.argument("name", metavar="ID|PATH")
@format_option
@click.pass_obj
def command(settings: Settings, /, name: str, format_: str) -> None:
    """Show one attachment: named by its id, the beginning of that, or its path.

    `processes` are those that have its file open, VMMs mostly.
    """
    from pathlib import Path

    from imgsnap.mount.process import processes_with_open

    item = find_attached(settings, name)
    found = {**as_json(item), "processes": processes_with_open(Path(item["path"]))}
    if format_ == "json":
        print_json(found)
        return
    for key, value in found.items():
        if key == "size":
            value = f"{value} ({format_size(value)})"
        elif key == "processes":
            value = " ".join(map(str, value)) or "none"
        click.echo(f"{key + ':':12} {value}")
