"""imgsnap cache"""

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import Places, node_cache, platform_option, policy_option, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.cache_usage import CachedSnapshot

DEFAULT_HOLDER = "user"


@click.group(short_help="Look after the node's cache: sizes, quota, pins, check")
def command() -> None:
    """Look after the node's cache: what it holds, how much it may take, whether it is intact."""


@command.command()
@format_option
@click.pass_obj
def du(settings: Settings, /, format_: str) -> None:
    """Show what the cache takes on disk, by kind, and its quota."""
    from imgsnap.blockstore.cache_quota import UNLIMITED, quota
    from imgsnap.blockstore.cache_usage import by_kind, scan

    cache = node_cache(settings)
    kinds = by_kind(scan(cache))
    total, limit = sum(kinds.values()), quota(cache)
    if format_ == "json":
        shown = None if limit >= UNLIMITED else limit
        print_json({"kinds": kinds, "total": total, "quota": shown})
        return
    rows = [(kind, format_size(size)) for kind, size in kinds.items()]
    rows.append(("total", format_size(total)))
    rows.append(("quota", "none" if limit >= UNLIMITED else format_size(limit)))
    print_table(("KIND", "ON DISK"), rows)


@command.command()
@format_option
@click.pass_obj
def ls(settings: Settings, /, format_: str) -> None:
    """List the snapshots in the cache, the least recently used first.

    OWN is what goes when the snapshot goes, SHARED what other snapshots use as well.
    """
    from imgsnap.blockstore.cache_usage import scan, snapshots

    cache = node_cache(settings)
    found = snapshots(cache, scan(cache))
    if format_ == "json":
        print_json({"snapshots": [_as_json(item) for item in found]})
        return
    print_table(
        ("SNAPSHOT", "OWN", "SHARED", "COMPLETE", "LAST USE", "STATE", "NAMES"),
        [
            (
                item.manifest[:19],
                format_size(item.own),
                format_size(item.shared),
                f"{int(item.complete * 100)}%",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(item.used)),
                _state(item),
                ",".join(item.names) or "-",
            )
            for item in found
        ],
    )


def _as_json(item: "CachedSnapshot") -> dict[str, Any]:
    return {
        "digest": item.manifest,
        "names": list(item.names),
        "own": item.own,
        "shared": item.shared,
        "present": item.present,
        "size": item.size,
        "used": int(item.used),
        "pins": list(item.holders),
        "inUse": item.in_use,
    }


def _state(item: "CachedSnapshot") -> str:
    words = ["in use"] if item.in_use else []
    if item.holders:
        words.append(f"pinned by {', '.join(item.holders)}")
    return "; ".join(words) or "-"


@command.command()
@click.option("--all", "everything", is_flag=True, help="Everything that is not in use or pinned")
@click.option("--keep", metavar="SIZE", help="Until the cache takes this much [the quota]")
@click.option("--dry-run", is_flag=True, help="Say what would go")
@format_option
@click.pass_obj
def prune(
    settings: Settings, /, everything: bool, keep: str | None, dry_run: bool, format_: str
) -> None:
    """Remove the least recently used from the cache.

    What a process has open or a pin names always stays.
    """
    from imgsnap.blockstore.cache_evict import evict
    from imgsnap.blockstore.cache_quota import parse_quota, quota
    from imgsnap.blockstore.cache_usage import by_kind, scan

    if everything and keep is not None:
        raise click.UsageError("--all and --keep exclude each other")
    cache = node_cache(settings)
    if everything:
        target = 0
    else:
        target = parse_quota(keep) if keep is not None else quota(cache)
    if not dry_run:
        cache.remove_stale_temporaries()
    result = evict(cache, target, scan(cache), dry_run=dry_run)
    freed = sum(entry.bytes for entry in result.removed)
    if format_ == "json":
        kinds = {kind: size for kind, size in by_kind(result.removed).items() if size}
        print_json(
            {
                "removed": len(result.removed),
                "freed": freed,
                "kinds": kinds,
                "used": result.used,
                "dryRun": dry_run,
            }
        )
        return
    verb = "would remove" if dry_run else "removed"
    click.echo(
        f"{verb} {len(result.removed)} entries, {format_size(freed)}; "
        f"{format_size(result.used)} left"
    )


@command.command()
@click.option("--repair", is_flag=True, help="Quarantine what is damaged; it is fetched again")
@format_option
@click.pass_obj
def check(settings: Settings, /, repair: bool, format_: str) -> int:
    """Read and verify everything in the cache; exit code 3 when something is damaged.

    An extent that no cached chunk map describes cannot be verified; --repair removes it.
    """
    from imgsnap.blockstore.cache_check import DAMAGED, check_cache
    from imgsnap.errors import IntegrityError

    report = check_cache(node_cache(settings), repair=repair)
    damaged = [finding for finding in report.findings if finding.state == DAMAGED]
    if format_ == "json":
        print_json(
            {
                "entries": report.entries,
                "chunks": report.chunks,
                "bytes": report.bytes,
                "repaired": repair,
                "findings": [
                    {
                        "kind": finding.kind,
                        "name": finding.name,
                        "state": finding.state,
                        "problem": finding.problem,
                    }
                    for finding in report.findings
                ],
            }
        )
    else:
        for finding in report.findings:
            click.echo(f"{finding.state}: {finding.kind}/{finding.name}: {finding.problem}")
        done = f"; {len(report.findings)} repaired" if repair else ""
        click.echo(
            f"{report.entries} entries, {report.chunks} chunks, {format_size(report.bytes)} read: "
            f"{len(damaged)} damaged, {len(report.findings) - len(damaged)} unverifiable{done}"
        )
    return IntegrityError.exit_code if damaged else 0


@command.command()
@click.argument("size", required=False)
@click.pass_obj
def quota(settings: Settings, /, size: str | None) -> None:
    """Show the quota, or keep a new one with the cache: SIZE such as 20GiB, or none."""
    from imgsnap.blockstore import cache_quota

    cache = node_cache(settings)
    if size is not None:
        cache_quota.keep_quota(cache, cache_quota.parse_quota(size))
    limit = cache_quota.kept_quota(cache) if size is not None else cache_quota.quota(cache)
    click.echo("none" if limit >= cache_quota.UNLIMITED else format_size(limit))


@command.command()
@click.argument("ref")
@click.option("--name", default=DEFAULT_HOLDER, show_default=True, help="Who needs it")
@platform_option
@policy_option
@registry_flags
@click.pass_obj
def pin(settings: Settings, /, ref: str, name: str, platform: str | None, **flags: Any) -> None:
    """Keep what the cache has and gets of the snapshot REF from eviction.

    It can then be opened while its registry is away. `imgsnap warm --pin` fetches its data too.
    """
    from imgsnap.blockstore.cache_pins import pin_snapshot

    with ExitStack() as stack:
        snapshot = Places(settings, flags).snapshot(stack, ref, platform)
        pin_snapshot(node_cache(settings), snapshot, name)
        click.echo(snapshot.manifest.digest)


@command.command()
@click.argument("snapshot")
@click.option("--name", default=DEFAULT_HOLDER, show_default=True, help="Who needed it")
@click.pass_obj
def unpin(settings: Settings, /, snapshot: str, name: str) -> None:
    """Let a pinned snapshot go; SNAPSHOT is its digest, as `imgsnap cache pin` printed it.

    The first digits are enough when only one pinned snapshot begins with them.
    """
    from imgsnap.blockstore.cache_pins import pins, unpin
    from imgsnap.errors import InvalidArgument, NotFound

    cache = node_cache(settings)
    wanted = snapshot if snapshot.startswith("sha256:") else f"sha256:{snapshot}"
    found = {
        item.manifest
        for item in pins(cache).pins
        if item.holder == name and item.manifest.startswith(wanted)
    }
    if not found:
        raise NotFound(f"{name} has no pin of {snapshot}", hint="list them with `imgsnap cache ls`")
    if len(found) > 1:
        raise InvalidArgument(f"{snapshot!r} begins {len(found)} pinned snapshots")
    unpin(cache, found.pop(), name)
