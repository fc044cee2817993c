"""imgsnap warm"""

from contextlib import ExitStack
from typing import Any

import click

from imgsnap.units import format_size
from imgsnap_cli.places import Places, node_cache, platform_option, policy_option, registry_flags
from imgsnap_cli.progress import make_progress, progress_option
from imgsnap_cli.settings import Settings


@click.command(short_help="Fill the node's cache with a snapshot")
@click.argument("ref")
@click.option("--pin", "holder", metavar="NAME", help="Keep it from eviction, for NAME")
@platform_option
@progress_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    holder: str | None,
    platform: str | None,
    progress: str,
    **flags: Any,
) -> None:
    """Fetch and verify every chunk of the snapshot REF into the node's cache.

    With --pin it stays there until `imgsnap cache unpin`.
    """
    places = Places(settings, flags)
    with ExitStack() as stack:
        snapshot = places.snapshot(stack, ref, platform)
        if holder is not None:
            from imgsnap.blockstore.cache_pins import pin_snapshot

            pin_snapshot(node_cache(settings), snapshot, holder)
        reader = stack.enter_context(places.block_reader(snapshot))
        watcher = make_progress(progress)
        label = snapshot.manifest.digest[7:19]
        watcher.stage(label, "fetch", reader.size)
        done = 0

        def advance(count: int, total: int) -> None:
            nonlocal done
            watcher.advance(label, count - done)
            done = count

        reader.warm(advance)
        watcher.done(label, f"{format_size(reader.size)} in the cache")
