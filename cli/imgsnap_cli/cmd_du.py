"""imgsnap du"""

from contextlib import ExitStack
from typing import Any

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import Places, registry_flags
from imgsnap_cli.settings import Settings


@click.command(short_help="Show what a snapshot takes in its store")
@click.argument("ref")
@format_option
@registry_flags
@click.pass_obj
def command(settings: Settings, /, ref: str, format_: str, **flags: Any) -> None:
    """Show the bytes of the snapshot REF in its store or registry.

    Unique bytes would go with it; the others are also used by other tags of the same repository,
    the converted layers among them counted for the images that use them.
    """
    from imgsnap.blockstore.store_usage import usage

    with ExitStack() as stack:
        repository, reference = Places(settings, flags).reader(stack, ref)
        found = usage(repository, reference)
    if format_ == "json":
        print_json(
            {
                "digest": found.digest,
                "unique": found.unique,
                "shared": found.shared,
                "total": found.unique + found.shared,
                "kinds": {
                    kind: {"unique": unique, "shared": shared}
                    for kind, (unique, shared) in found.kinds.items()
                },
            }
        )
        return
    rows = [
        (kind, format_size(unique), format_size(shared))
        for kind, (unique, shared) in found.kinds.items()
    ]
    print_table(
        ("KIND", "UNIQUE", "SHARED"),
        [*rows, ("total", format_size(found.unique), format_size(found.shared))],
    )
