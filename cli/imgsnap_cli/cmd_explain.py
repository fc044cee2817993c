"""imgsnap explain"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from imgsnap_cli.output import SCHEMA, printable, table_lines
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.node.explain import BootPack, Explanation, StallView

_SHORT = 12
"""Digits of a digest in a table."""


@click.command(short_help="Show what a mounted snapshot's reads waited for")
@click.argument("mounted", metavar="MOUNT_DIR|CONTAINER|SNAPSHOT")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "html"]),
    default="text",
    show_default=True,
    help="Form of the output",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for it [stdout]")
@click.option(
    "--top", type=click.IntRange(0), default=20, show_default=True, help="Longest waits in text"
)
@click.pass_obj
def command(
    settings: Settings, /, mounted: str, format_: str, output: Path | None, top: int
) -> None:
    """Show the timeline of a start: which reads waited, for which files, how long, for whom.

    MOUNT_DIR is a directory that shows a snapshot, CONTAINER the id of a running container or the
    directory of its root, SNAPSHOT the digest of one that the daemon has attached; ids and digests
    may be cut short. JSON and HTML have all stalls; text has the --top longest, by time.
    """
    from imgsnap.node.explain import explain

    found = explain(settings.run, mounted)
    if format_ == "json":
        import json

        value = {"schema": SCHEMA, **found.as_dict()}
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    elif format_ == "html":
        from imgsnap_cli.explain_html import page

        text = page(found)
    else:
        text = "\n".join(_text(found, top)) + "\n"
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text, "utf-8", errors="surrogateescape")


def _text(found: "Explanation", top: int) -> list[str]:
    if found.direct:
        return [f"{found.snapshot}: complete and mounted from local files; no read can wait"]
    lines = []
    longest = sorted(found.stalls, key=lambda stall: -stall.wait)[:top]
    if longest:
        headers = ("AT ms", "WAIT ms", "BYTES", "SOURCE", "LAYER", "CHUNK", "FILE")
        rows = [_row(stall) for stall in sorted(longest, key=lambda stall: stall.at)]
        lines += [*table_lines(headers, rows), ""]
    return [*lines, *summary(found)]


def _row(stall: "StallView") -> tuple[object, ...]:
    return (
        round(stall.at * 1000),
        round(stall.wait * 1000),
        stall.bytes,
        "error" if stall.error else ",".join(stall.sources),
        _several([short(layer) for layer in stall.layers]),
        _several([chunk.id[:_SHORT] for chunk in stall.chunks], stall.chunk_count),
        files(stall),
    )


def short(digest: str) -> str:
    return digest.partition(":")[2][:_SHORT]


def _several(names: list[str], count: int = 0) -> str:
    """The first name and how many more there are."""
    more = max(count, len(names)) - 1
    return (names[0] if names else "-") + (f" +{more}" if more > 0 else "")


def files(stall: "StallView") -> str:
    """The files of a stall on one line."""
    if not stall.paths:
        return "?"
    # Escaped as the image's names are elsewhere: they may hold control characters.
    names = ", ".join(printable(path.encode("utf-8")) for path in stall.paths)
    return names + (", …" if stall.more_paths else "")


def summary(found: "Explanation") -> list[str]:
    """What to know about a start in a few lines; text and HTML share them."""
    totals = found.totals
    lines = [
        f"snapshot   {found.repository}@{found.snapshot}",
        f"reads      {found.reads}: {found.hits} hits, {found.misses} waited",
        f"stalls     {totals.stalls}, waits {_ms(totals.wait)} in all; "
        f"held up for {_ms(totals.held_up)}, {totals.errors} errors",
    ]
    if totals.dropped:
        lines.append(f"not kept   {totals.dropped} later stalls; counted above")
    fetched = [
        f"{kind} {counts['bytes']} bytes in {counts['requests']} requests"
        for kind in ("demand", "readahead", "prefetch")
        if (counts := found.statistics.get(kind)) and counts["requests"]
    ]
    lines.append(f"fetched    {'; '.join(fetched) or 'nothing'}")
    hosts = found.statistics.get("hosts", {})
    if hosts:
        served = (f"{name} {counts['bytes']} bytes" for name, counts in sorted(hosts.items()))
        lines.append(f"hosts      {'; '.join(served)}")
    lines += _pack_lines(found.boot_pack)
    return lines + [f"note       {note}" for note in found.notes]


def _pack_lines(pack: "BootPack") -> list[str]:
    counts = pack.statistics
    if counts.get("requests"):
        used = f"{counts.get('bytes', 0)} bytes, {counts.get('blocks', 0)} blocks"
        lines = [f"boot pack  brought {used}, ended {pack.covered} stalls, missed {pack.missed}"]
    else:
        lines = ["boot pack  none was used"]
    if pack.missed:
        lines.append(
            f"a new one  would save {pack.missed} stalls, {_ms(pack.missed_held_up)} of waiting: "
            f"{pack.missed_blocks} blocks, in chunks of {pack.missed_bytes} bytes"
        )
    if pack.advised:
        lines.append(
            "advice     imgsnap trace REF -o start.json; imgsnap optimize REF --trace start.json"
        )
    return lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
