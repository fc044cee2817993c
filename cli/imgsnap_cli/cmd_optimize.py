"""imgsnap optimize"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from imgsnap.units import BLOCK_SIZE, format_size
from imgsnap_cli.output import format_option, print_json
from imgsnap_cli.places import Places, platform_option, policy_option, registry_flags
from imgsnap_cli.settings import Settings


@click.command(short_help="Make a boot pack of recorded starts")
@click.argument("ref")
@click.option(
    "--trace",
    "traces",
    metavar="FILE",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="From `imgsnap trace`; may be repeated",
)
@click.option("--name", help="Of the boot pack [the program of the image's command]")
@click.option("--work-dir", metavar="DIR", help="For temporary files [TMPDIR, /var/tmp]")
@platform_option
@format_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    traces: tuple[Path, ...],
    name: str | None,
    work_dir: str | None,
    platform: str | None,
    format_: str,
    **flags: Any,
) -> None:
    """Make a boot pack of the blocks in these traces and attach it to the snapshot REF.

    \b
    imgsnap trace registry.example/app:1.0-snap -o start.json
    imgsnap optimize registry.example/app:1.0-snap --trace start.json

    From then on `mount` and `run` load those blocks in one request. A snapshot may have boot packs
    for several commands, by name; the newest of a name counts. Without --name it is the one for the
    image's own command, which is taken when no name is asked for.
    """
    from imgsnap.blockstore.boot_choice import check_name, name_of_command
    from imgsnap.blockstore.node_cache import NodeCache
    from imgsnap.blockstore.snapshot import read_image_config
    from imgsnap.convert.boot_pack import optimize
    from imgsnap.formats.trace import parse_trace
    from imgsnap.oci.image_config import parse_run_config

    if name is not None:
        check_name(name)
    parsed = [parse_trace(path.read_bytes()) for path in traces]
    places = Places(settings, flags)
    with ExitStack() as stack:
        target, _ = places.updater(stack, ref)
        snapshot = places.snapshot(stack, ref, platform)
        config = parse_run_config(read_image_config(snapshot, NodeCache(settings.cache)))
        reader = stack.enter_context(places.block_reader(snapshot))
        pack, built = optimize(
            snapshot,
            reader,
            parsed,
            target,
            name or name_of_command((*config.entrypoint, *config.cmd)),
            Path(work_dir or settings.environ.get("TMPDIR") or "/var/tmp"),  # noqa: S108
            default=name is None,
        )
    value = {
        "name": pack.name,
        "digest": pack.blob.digest,
        "size": pack.blob.size,
        "manifest": pack.manifest,
        "snapshot": snapshot.manifest.digest,
        "blocks": built.table.blocks,
        "frames": len(built.table.frames),
        "tableSize": pack.blob.size - built.table.frames_length,
        "ignoredBlocks": built.ignored,
    }
    if format_ == "json":
        print_json(value)
        return
    size = format_size(built.table.blocks * BLOCK_SIZE)
    click.echo(f"{pack.name}: {size} of blocks in {format_size(pack.blob.size)}")
    if built.ignored:
        click.echo(f"{built.ignored} blocks of the traces are not in this snapshot", err=True)
