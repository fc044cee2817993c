"""imgsnap cat"""

import sys
from contextlib import ExitStack
from typing import Any

import click

from imgsnap.errors import InvalidArgument
from imgsnap.formats.layer_index import Kind
from imgsnap.units import MIB
from imgsnap_cli.places import Places, platform_option, policy_option, registry_flags
from imgsnap_cli.settings import Settings


@click.command(short_help="Print a file of a snapshot")
@click.argument("ref")
@click.argument("path")
@platform_option
@policy_option
@registry_flags
@click.pass_obj
def command(settings: Settings, /, ref: str, path: str, platform: str | None, **flags: Any) -> None:
    """Print the file PATH of the snapshot REF, fetching only its chunks. Symlinks are followed."""
    from imgsnap.formats.erofs_read import ErofsReader

    places = Places(settings, flags)
    with ExitStack() as stack:
        snapshot = places.snapshot(stack, ref, platform)
        reader = ErofsReader(stack.enter_context(places.block_reader(snapshot)))
        inode = reader.resolve(path.encode("utf-8", "surrogateescape"))
        if inode.kind != Kind.FILE:
            raise InvalidArgument(
                f"{path} is a {Kind(inode.kind).name.lower().replace('_', ' ')}, not a file",
                hint=f"list it with: imgsnap files {ref} {path}",
            )
        out = sys.stdout.buffer
        for offset in range(0, inode.size, MIB):
            out.write(reader.read(inode, offset, min(MIB, inode.size - offset)))
