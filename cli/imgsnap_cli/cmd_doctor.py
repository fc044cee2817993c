"""imgsnap doctor"""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from imgsnap.errors import ImgsnapError
from imgsnap_cli.output import format_option, print_json
from imgsnap_cli.places import Places, registry_flags
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.mount.doctor import Check

_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


@click.command(short_help="Say what this machine can do and what to install")
@click.argument("ref", required=False)
@click.option("--containerd-config", metavar="FILE", help="[/etc/containerd/config.toml]")
@format_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str | None,
    containerd_config: str | None,
    format_: str,
    **flags: Any,
) -> int:
    """Check kernel, file systems, devices, programs and containerd's configuration; with REF also
    its registry's ranges.

    Exit code 8 when snapshots cannot be mounted here.
    """
    from imgsnap.mount.doctor import Status, examine

    places = Places(settings, flags)
    checks = list(
        examine(
            try_mount=_try_mount,
            probe_ranges=(lambda: _probe(places, ref)) if ref is not None else None,
        )
    )
    checks += _containerd(settings, containerd_config)
    failed = any(check.status is Status.FAIL for check in checks)
    if format_ == "json":
        print_json(
            {
                "ok": not failed,
                "checks": [
                    {
                        "name": check.name,
                        "status": check.status.value,
                        "detail": check.detail,
                        "hint": check.hint,
                    }
                    for check in checks
                ],
            }
        )
    else:
        for check in checks:
            click.echo(f"{_MARKS[check.status.value]}  {check.name}: {check.detail}")
            if check.hint:
                click.echo(f"      {check.hint}")
    return 8 if failed else 0


def _containerd(settings: Settings, file: str | None) -> "list[Check]":
    """Nothing where there is neither a containerd nor a configuration of it."""
    from imgsnap.containerd.config import CONFIG_FILE, installed_version
    from imgsnap.snapshotter.doctor import examine_containerd

    path = Path(file).absolute() if file else CONFIG_FILE
    try:
        version, _ = installed_version(settings.containerd)
    except ImgsnapError:
        if file is None and not path.exists():
            return []
        version = None
    return list(examine_containerd(settings.snapshotter, file=path, containerd=version))


def _try_mount() -> str:
    from imgsnap.convert.erofs_write import emit
    from imgsnap.convert.flatten import flatten
    from imgsnap.mount.doctor import file_backed_mount

    with TemporaryDirectory(prefix="imgsnap-doctor-") as directory:
        return file_backed_mount(emit(flatten([])).metadata, Path(directory))


def _probe(places: Places, ref: str) -> str:
    """Asks for one byte in the middle of the largest blob behind a reference."""
    from imgsnap.oci.manifest import ImageIndex, parse_document
    from imgsnap.oci.transfer import blobs_of

    with ExitStack() as stack:
        repository, reference = places.reader(stack, ref)
        document = parse_document(repository.manifest(reference).raw)
        while isinstance(document, ImageIndex):
            document = parse_document(repository.manifest(document.manifests[0].digest).raw)
        largest = max(blobs_of(document), key=lambda blob: blob.size)
        repository.read_range(largest, largest.size // 2, 1)
    return f"{repository.name} serves ranges"
