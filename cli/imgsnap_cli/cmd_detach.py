"""imgsnap detach"""

from pathlib import Path

import click

from imgsnap.errors import InvalidArgument, NotFound
from imgsnap_cli.settings import Settings

ID_PREFIX_MIN = 6


@click.command(short_help="Detach what was attached")
@click.argument("name", metavar="ID|PATH")
@click.option("--lazy", is_flag=True, help="Also while it is in use: who has it open reads on")
@click.pass_obj
def command(settings: Settings, /, name: str, lazy: bool) -> None:
    """Take an attached device away: named by its id, the beginning of that, or its path.

    Refused while a process has it open, unless --lazy.
    """
    from imgsnap.node.client import daemon_call

    attached = [item for item in daemon_call(settings.run, "attachments") if item["attached"]]
    digits = name.removeprefix("sha256:")
    found = [
        item["id"]
        for item in attached
        if item["path"] == str(Path(name).absolute())
        or (len(digits) >= ID_PREFIX_MIN and item["id"].startswith(digits))
    ]
    if len(found) > 1:
        raise InvalidArgument(
            f"{name} is the beginning of {len(found)} ids", hint="give more of it"
        )
    if not found:
        raise NotFound(f"{name} is not attached", hint="list what is: imgsnap attachments")
    daemon_call(settings.run, "detach", id=found[0], lazy=lazy)
