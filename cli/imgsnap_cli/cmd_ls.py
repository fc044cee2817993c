"""imgsnap ls"""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import Places, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.oci.repository import Repository


@click.command(short_help="List snapshots in the local store or a repository")
@click.argument("repository", required=False)
@click.option("-q", "--quiet", is_flag=True, help="Names only")
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings, /, repository: str | None, quiet: bool, format_: str, **flags: Any
) -> None:
    """List the snapshots of the local store, or of REPOSITORY (REGISTRY/NAME or oci:DIR)."""
    from imgsnap.errors import NotFound

    places = Places(settings, flags)
    with ExitStack() as stack:
        try:
            place = places.repository(stack, repository or "store:any")
            rows = _snapshots(place, "store:" if repository is None else f"{repository}:")
        except NotFound:
            if repository is not None:
                raise
            rows = []  # nothing has been stored yet
    if format_ == "json":
        print_json({"snapshots": rows})
    elif quiet:
        for row in rows:
            click.echo(row["name"])
    else:
        print_table(
            ("NAME", "DIGEST", "FORM", "PLATFORM", "STORED"),
            [
                (
                    row["name"],
                    row["digest"][:19],
                    row["form"],
                    row["platform"],
                    format_size(row["stored"]),
                )
                for row in rows
            ],
        )


def _snapshots(place: "Repository", prefix: str) -> list[dict[str, Any]]:
    """A row per tag that holds a snapshot or an index of snapshots; other tags are left out."""
    from imgsnap.errors import FormatError, NotFound
    from imgsnap.oci.manifest import ImageIndex, parse_document
    from imgsnap.oci.media_types import LAYER_TAG_PREFIX
    from imgsnap.oci.published import NO_PLATFORM, content_of
    from imgsnap.oci.transfer import total_size

    rows = []
    for tag in place.tags():
        if tag.startswith(LAYER_TAG_PREFIX):
            continue
        try:
            raw = place.manifest(tag)
            content = content_of(raw)
        except (FormatError, NotFound):
            continue
        if content is None:
            continue
        document = parse_document(raw.raw, media_type=raw.descriptor.media_type)
        platforms = (
            [str(e.platform) for e in document.manifests if e.platform not in (None, NO_PLATFORM)]
            if isinstance(document, ImageIndex)
            else []
        )
        rows.append(
            {
                "name": prefix + tag,
                "digest": raw.descriptor.digest,
                "form": content.form.value,
                "platform": ",".join(platforms) or "-",
                "stored": total_size(place, tag),
            }
        )
    return rows
