"""imgsnap attachments"""

import click

from imgsnap.units import format_size
from imgsnap_cli.attached import as_json, attached
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.settings import Settings


@click.command(short_help="List attached snapshots")
@format_option
@click.pass_obj
def command(settings: Settings, /, format_: str) -> None:
    """List what `imgsnap attach` attached; `imgsnap mounts` lists mounts."""
    found = attached(settings)
    if format_ == "json":
        print_json({"attachments": [as_json(item) for item in found]})
        return
    print_table(
        ("ID", "SIZE", "REPOSITORY", "PATH"),
        [
            (item["id"][:12], format_size(item["device_size"]), item["repository"], item["path"])
            for item in found
        ],
    )
