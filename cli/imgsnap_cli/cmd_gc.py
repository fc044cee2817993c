"""imgsnap gc"""

import hashlib
import re
from contextlib import ExitStack
from typing import Any

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json
from imgsnap_cli.places import Places, registry_flags
from imgsnap_cli.settings import Settings

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.command(short_help="Delete snapshots and layers that no tag leads to")
@click.argument("repository")
@click.option("--grace", default="24h", show_default=True, metavar="TIME", help="Spare the younger")
@click.option("--keep-tag", "keep_tags", multiple=True, metavar="GLOB", help="Of snapshots [all]")
@click.option("--dry-run", is_flag=True, help="Say what would go")
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    repository: str,
    grace: str,
    keep_tags: tuple[str, ...],
    dry_run: bool,
    format_: str,
    **flags: Any,
) -> None:
    """Delete what no tag leads to from REPOSITORY: a registry's, a layout or store:any.

    Kept are all tags (of snapshots only those that match --keep-tag, when it is given), what they
    reach, the referrers of that, and the converted layers of kept snapshots. Only manifests made
    by imgsnap are deleted. In a layout their blobs go too; a registry frees them by its own
    garbage collection. A registry tells no ages: there the grace period begins when gc first sees
    that a manifest is unused, so a first run deletes nothing unless --grace is 0.
    """
    from imgsnap.blockstore.chunk_index import ChunkIndex
    from imgsnap.blockstore.store_gc import Options, collect
    from imgsnap.errors import Unsupported
    from imgsnap.oci.layout import LayoutRepository
    from imgsnap.oci.registry import RegistryRepository

    places = Places(settings, flags)
    options = Options(_seconds(grace), keep_tags, dry_run)
    with ExitStack() as stack:
        place = places.repository(stack, repository)
        if not isinstance(place, LayoutRepository | RegistryRepository):
            raise Unsupported(f"{place.name} cannot be collected", hint="only layouts, registries")
        name = hashlib.sha256(place.name.encode()).hexdigest()[:32]
        result = collect(place, options, state=settings.cache / "gc" / f"{name}.json")
    index = places.chunk_index_path(repository)
    if result.packs and not dry_run and index.exists():
        with ChunkIndex(index) as known:
            known.forget_packs(result.packs)
    if format_ == "json":
        rows = [
            {"digest": item.digest, "kind": item.kind, "tags": list(item.tags)}
            for item in result.manifests
        ]
        print_json(
            {
                "deleted": rows,
                "waiting": len(result.waiting),
                "kept": result.kept,
                "blobs": result.blobs,
                "bytes": result.bytes,
                "dryRun": dry_run,
            }
        )
        return
    for item in result.manifests:
        click.echo(f"{item.kind} {item.digest[:19]} {' '.join(item.tags)}".rstrip())
    click.echo(
        f"{'would delete' if dry_run else 'deleted'} {len(result.manifests)} manifests and "
        f"{result.blobs} blobs, {format_size(result.bytes)}; {len(result.waiting)} unused but "
        f"younger than {grace}; {result.kept} kept"
    )


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd]?)", text.strip())
    if not match:
        raise click.UsageError(f"--grace {text!r} is no time; for example 24h, 30m, 7d or 0")
    return int(match[1]) * _UNITS[match[2] or "s"]
