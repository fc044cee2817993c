"""imgsnap attachments"""

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.settings import Settings


@click.command(short_help="List attached snapshots")
@format_option
@click.pass_obj
def command(settings: Settings, /, format_: str) -> None:
    """List what `imgsnap attach` attached; `imgsnap mounts` lists mounts."""
    from imgsnap.errors import NotFound
    from imgsnap.node.client import daemon_call

    try:
        found = daemon_call(settings.run, "attachments")
    except NotFound:
        found = []  # without a daemon nothing is attached
    attached = [item for item in found if item["attached"]]
    if format_ == "json":
        print_json(
            {
                "attachments": [
                    {
                        "id": item["id"],
                        "path": item["path"],
                        "size": item["device_size"],
                        "repository": item["repository"],
                        "digest": item["manifest_digest"],
                    }
                    for item in attached
                ]
            }
        )
        return
    print_table(
        ("ID", "SIZE", "REPOSITORY", "PATH"),
        [
            (item["id"][:12], format_size(item["device_size"]), item["repository"], item["path"])
            for item in attached
        ],
    )
