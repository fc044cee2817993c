"""imgsnap check"""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from imgsnap.errors import IntegrityError
from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, printable
from imgsnap_cli.places import Places, platform_option, registry_flags
from imgsnap_cli.settings import Settings

SHOWN = 100
"""Differences printed; the count is always whole."""


@click.command(short_help="Verify a snapshot, optionally against its source image")
@click.argument("ref")
@click.option("--source", metavar="IMAGE", help="Compare every entry with this image")
@click.option("--work-dir", metavar="DIR", help="For the decompressed device [TMPDIR, /var/tmp]")
@platform_option
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    source: str | None,
    work_dir: str | None,
    platform: str | None,
    format_: str,
    **flags: Any,
) -> int:
    """Verify every digest of the snapshot REF, and that its file system can be walked. A dm-verity
    hash tree is computed anew.

    With --source also compare each entry's type, mode, owner, mtime, xattrs, device number, link
    group and content with the image's layers, unpacked independently of the converter. Exit code
    3 when something is damaged or differs.
    """
    from imgsnap.blockstore.materialise import materialise
    from imgsnap.blockstore.verity_tree import check_tree

    places = Places(settings, flags)
    directory = work_dir or settings.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(dir=directory, prefix="imgsnap-check-")))
        snapshot = places.any_snapshot(stack, ref, platform)
        device = work / "device"
        verified = materialise(snapshot, device)
        root_hash = check_tree(snapshot.config, device, work / "hash-tree")
        entries, differences = _compare(places, stack, device, source, snapshot, work)
    result = {
        "digest": snapshot.manifest.digest,
        "packs": verified.packs,
        "packBytes": verified.pack_bytes,
        "chunks": verified.chunks,
        "zeroChunks": verified.zero_chunks,
        "rootHash": root_hash,
        "entries": entries,
        "source": source,
        "differences": [
            {
                "path": printable(d.path),
                "field": d.field,
                "snapshot": d.snapshot,
                "source": d.source,
            }
            for d in differences
        ],
    }
    if format_ == "json":
        print_json(result)
    else:
        _print(result, differences)
    if differences:
        raise IntegrityError(f"{ref} differs from {source} in {len(differences)} places")
    return 0


def _compare(
    places: Places, stack: ExitStack, device: Path, source: str | None, snapshot: Any, work: Path
) -> tuple[int, list[Any]]:
    from imgsnap.blockstore.flat import FlatDevice
    from imgsnap.convert.check import compare, reference_tree
    from imgsnap.convert.limits import Limits
    from imgsnap.convert.source import select_images
    from imgsnap.formats.erofs_read import ErofsReader
    from imgsnap.oci.repository import Platform

    reader = ErofsReader(stack.enter_context(FlatDevice(device)))
    if source is None:
        return sum(1 for _ in reader.walk()), []
    origin, reference = places.reader(stack, source)
    config = snapshot.config
    wanted = Platform(config.os, config.architecture, config.variant)
    (image,) = select_images(origin, reference, [wanted], Limits())
    tree = reference_tree(origin, image, work, Limits())
    return sum(1 for _ in tree.walk()), list(compare(reader, tree))


def _print(result: dict[str, Any], differences: list[Any]) -> None:
    click.echo(
        f"{result['digest']}: {result['chunks']} chunks in {result['packs']} packs "
        f"({format_size(result['packBytes'])}) verified, {result['entries']} entries walked"
    )
    if result["rootHash"] is not None:
        click.echo(f"dm-verity root hash {result['rootHash']} computed anew: right")
    for d in differences[:SHOWN]:
        click.echo(f"  {printable(d.path) or '/'}: {d.field}: {d.snapshot} (source: {d.source})")
    if len(differences) > SHOWN:
        click.echo(f"  … and {len(differences) - SHOWN} more")
    if result["source"] and not differences:
        click.echo(f"no difference from {result['source']}")
