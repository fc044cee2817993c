"""imgsnap mounts"""

import click

from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.settings import Settings


@click.command(short_help="List mounted snapshots")
@format_option
@click.pass_obj
def command(settings: Settings, /, format_: str) -> None:
    """List the mounted snapshots of this machine."""
    from imgsnap.node.session import mounts

    records = mounts(settings.run)
    if format_ == "json":
        print_json(
            {
                "mounts": [
                    {
                        "target": record.target,
                        "repository": record.repository,
                        "reference": record.reference,
                        "digest": record.manifest_digest,
                        "writable": record.read_write,
                        "pid": record.server_pid,
                        "alive": record.server.alive,
                        "created": record.created,
                    }
                    for record in records
                ]
            }
        )
        return
    print_table(
        ("DIRECTORY", "SNAPSHOT", "MODE", "SERVER"),
        [
            (
                record.target,
                f"{record.repository}@{record.manifest_digest[:19]}",
                "rw" if record.read_write else "ro",
                str(record.server_pid) if record.server.alive else "dead",
            )
            for record in records
        ],
    )
