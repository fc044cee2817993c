"""imgsnap mounts"""

from typing import TYPE_CHECKING

import click

from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.mount.records import MountRecord


def _server(record: "MountRecord", *, alive: bool) -> str:
    if record.direct:
        return "none needed"
    if not alive:
        return "dead"
    return "daemon" if record.by_daemon else str(record.server_pid)


@click.command(short_help="List mounted snapshots")
@format_option
@click.pass_obj
def command(settings: Settings, /, format_: str) -> None:
    """List the mounted snapshots of this machine."""
    from imgsnap.node.client import mounts

    found = mounts(settings.run)
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
                        "alive": alive,
                        "daemon": record.by_daemon,
                        "direct": record.direct,
                        "created": record.created,
                    }
                    for record, alive in found
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
                _server(record, alive=alive),
            )
            for record, alive in found
        ],
    )
