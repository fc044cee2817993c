"""imgsnap detach"""

import click

from imgsnap_cli.attached import find_attached
from imgsnap_cli.settings import Settings


@click.command(short_help="Detach what was attached")
@click.argument("name", metavar="ID|PATH")
@click.option("--lazy", is_flag=True, help="Also while it is in use: who has it open reads on")
@click.pass_obj
def command(settings: Settings, /, name: str, lazy: bool) -> None:
    """Take an attached device away: named by its id, the beginning of that, or its path.

    Refused while a process has it open, unless --lazy.
    """
    from imgsnap.node.client import daemon_call

    daemon_call(settings.run, "detach", id=find_attached(settings, name)["id"], lazy=lazy)
