"""imgsnap umount"""

from pathlib import Path

import click

from imgsnap.errors import InvalidArgument
from imgsnap_cli.settings import Settings


@click.command(short_help="Unmount a snapshot")
@click.argument("directories", metavar="DIRECTORY…", nargs=-1, type=click.Path(path_type=Path))
@click.option("--all", "all_", is_flag=True, help="Every mounted snapshot")
@click.option("--lazy", is_flag=True, help="Detach now, clean up when the last user is gone")
@click.pass_obj
def command(settings: Settings, /, directories: tuple[Path, ...], all_: bool, lazy: bool) -> None:
    """Unmount snapshots and remove everything their mounts made; the cache stays."""
    from imgsnap.node.client import mounts, unmount

    if all_ == bool(directories):
        raise InvalidArgument("name directories, or use --all", hint="imgsnap mounts lists them")
    targets = [Path(record.target) for record, _ in mounts(settings.run)] if all_ else directories
    for target in targets:
        unmount(target, settings.run, settings.cache, lazy=lazy)
