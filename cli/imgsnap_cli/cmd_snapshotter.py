"""imgsnap snapshotter"""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imgsnap.units import format_size
from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import (
    Places,
    boot_pack_names,
    policy_option,
    quota,
    reading,
    reading_flags,
    registry_flags,
)
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.read_options import ReadOptions
    from imgsnap.snapshotter.image_service import ImageService
    from imgsnap.snapshotter.node_settings import NodeSettings
    from imgsnap.snapshotter.rows import Row

root_option = click.option(
    "--root",
    metavar="DIR",
    default="/var/lib/imgsnap/snapshotter",
    show_default=True,
    help="Where the containerd snapshots are",
)


@click.group(short_help="Run and look after the containerd snapshotter")
def command() -> None:
    """A proxy plugin for containerd: ordinary images run as with overlayfs.

    The other commands read beside a running snapshotter.
    """


@command.command(short_help="Run the snapshotter in the foreground")
@root_option
@click.option(
    "--address", metavar="SOCKET", help="Where containerd asks [RUN-DIR/snapshotter.sock]"
)
@click.option("--image-service", metavar="SOCKET", help="Pass CRI's image calls to containerd here")
@click.option("--containerd", metavar="SOCKET", help="Of --image-service [CONTAINERD_ADDRESS]")
@click.option(
    "--trust",
    metavar="PATTERN",
    multiple=True,
    help="Repositories whose snapshots of ordinary images are used [IMGSNAP_TRUST]",
)
@click.option(
    "--convert",
    metavar="PATTERN",
    multiple=True,
    help="Repositories whose images are converted on first use [IMGSNAP_CONVERT]",
)
@click.option(
    "--metrics",
    metavar="[ADDRESS:]PORT",
    help="Serve metrics over HTTP there [IMGSNAP_SNAPSHOTTER_METRICS]",
)
@click.option(
    "--mount-form",
    type=click.Choice(["overlay", "erofs", "manager"]),
    default="overlay",
    show_default=True,
    help="What containerd mounts of a snapshot: our mount, or its file",
)
@click.option("--one-file", is_flag=True, help="Mount every snapshot from one file, for Kata")
@reading_flags
@policy_option
@registry_flags
@click.pass_obj
def run(
    settings: Settings,
    /,
    root: str,
    address: str | None,
    image_service: str | None,
    containerd: str | None,
    trust: tuple[str, ...],
    convert: tuple[str, ...],
    metrics: str | None,
    mount_form: str,
    one_file: bool,
    prefetch: str,
    prefetch_rate: str | None,
    **flags: Any,
) -> int:
    """Answer containerd until SIGTERM. Containers do not notice when it ends or is killed.

    Images converted with `--as image` run from their snapshots. An ordinary image does if its own
    repository offers a snapshot of it and a --trust pattern ('*', 'registry.example/*') matches
    the repository: a snapshot's publisher says what the image's layers hold, for all images that
    share them. Any other image is unpacked as with overlayfs.

    With --convert an ordinary image of a repository that matches is converted in the background
    when a container runs from it, and published there: the next node finds it, where --trust
    matches too. The node's credentials must allow to push.

    Snapshots are shown by the node daemon, which is started if none runs, and stays.

    --mount-form erofs makes views of a snapshot its file itself, which needs a kernel with
    file-backed EROFS; manager containers, too, which needs containerd 2.2. Both imply --one-file.

    With --image-service the credentials of pulls are kept for later reads, if the kubelet's
    --image-service-endpoint is that socket.

    Says when it is ready where systemd asks for it (Type=notify).
    """
    from imgsnap.snapshotter import parts
    from imgsnap.snapshotter.conversion import first_use
    from imgsnap.snapshotter.counters import Counters
    from imgsnap.snapshotter.devices import NodeDevices
    from imgsnap.snapshotter.directories import make_root
    from imgsnap.snapshotter.mount_forms import MountForm
    from imgsnap.snapshotter.serve import Parts, serve

    read = reading(boot_pack_names(None), prefetch, prefetch_rate)
    form = MountForm(mount_form)
    node = _node(settings, Path(root).absolute(), flags, read)
    make_root(node.root)
    node = replace(
        node,
        trust=trust or settings.trust,
        convert=convert or settings.convert,
        one_file=one_file or form is not MountForm.OVERLAY,
    )
    socket = Path(address) if address else settings.run / "snapshotter.sock"
    images = _image_service(settings, image_service, containerd) if image_service else None
    finder, counters = parts.finder(node), Counters()
    made_of = Parts(
        finder,
        NodeDevices(node),
        parts.unpacker(node),
        form,
        first_use(node, finder, counters),
        counters,
    )
    metrics = metrics or settings.snapshotter_metrics
    return serve(node.root, socket.absolute(), made_of, image_service=images, metrics=metrics)


def _node(
    settings: Settings,
    root: Path,
    flags: dict[str, Any],
    read: "ReadOptions",
) -> "NodeSettings":
    from imgsnap.snapshotter import credentials
    from imgsnap.snapshotter.node_settings import NodeSettings

    registry = Places(settings, flags).registry_options()
    return NodeSettings(
        root=root,
        run_dir=settings.run,
        cache_dir=settings.cache,
        store=settings.store,
        registry=replace(registry, pod_credentials=settings.run / credentials.FILE_NAME),
        environ=settings.environ,
        cache_quota=quota(settings),
        policy=settings.policy,
        read=read,
    )


def _image_service(settings: Settings, address: str, containerd: str | None) -> "ImageService":
    from imgsnap.oci.locate import RegistryOptions
    from imgsnap.snapshotter import credentials
    from imgsnap.snapshotter.image_service import ImageService

    accepts = credentials.registry_accepts(
        RegistryOptions(hosts_dir=settings.hosts), dict(settings.environ)
    )
    file = settings.run / credentials.FILE_NAME
    server = Path(containerd).absolute() if containerd else settings.containerd
    kept = credentials.PodCredentials(file, accepts)
    return ImageService(Path(address).absolute(), server, kept)


@command.command(short_help="List containerd snapshots")
@root_option
@format_option
def ls(root: str, format_: str) -> None:
    """List the containerd snapshots with their states, oldest first."""
    rows = _rows(root)
    if format_ == "json":
        print_json({"snapshots": [_as_json(row) for row in rows]})
        return
    print_table(
        ("ID", "KIND", "STATE", "CREATED", "SIZE", "NAME", "PARENT"),
        [
            (
                row.id,
                row.kind.name.lower(),
                row.state,
                time.strftime("%Y-%m-%d %H:%M", time.localtime(row.created // 10**9)),
                format_size(row.usage.size) if row.usage else "-",
                row.name,
                row.parent or "-",
            )
            for row in rows
        ],
    )


@command.command(short_help="Show what containerd snapshots take on disk")
@root_option
@format_option
def usage(root: str, format_: str) -> None:
    """Measure every snapshot's directory now, and sum them up by state."""
    from imgsnap.snapshotter.report import usage_by_state

    found = usage_by_state(Path(root).absolute())
    if format_ == "json":
        states = {
            state: {"snapshots": count, "size": use.size, "inodes": use.inodes}
            for state, (count, use) in found.items()
        }
        print_json({"states": states})
        return
    print_table(
        ("STATE", "SNAPSHOTS", "ON DISK", "INODES"),
        [
            (state, count, format_size(use.size), use.inodes)
            for state, (count, use) in found.items()
        ],
    )


@command.command(short_help="Compare the snapshotter's ledger with its directories")
@root_option
@format_option
def check(root: str, format_: str) -> int:
    """Say which records and directories do not belong together; exit code 3 when some do not."""
    from imgsnap.errors import IntegrityError
    from imgsnap.snapshotter.report import check_root

    report = check_root(Path(root).absolute())
    if format_ == "json":
        print_json({"snapshots": report.rows, "problems": list(report.problems)})
    else:
        for problem in report.problems:
            click.echo(problem)
        click.echo(f"{report.rows} snapshots: {len(report.problems)} problems")
    return IntegrityError.exit_code if report.problems else 0


def _rows(root: str) -> "list[Row]":
    from contextlib import closing

    from imgsnap.snapshotter.ledger import Ledger

    with closing(Ledger.read(Path(root).absolute())) as ledger:
        return ledger.scan()


def _as_json(row: "Row") -> dict[str, Any]:
    return {
        "id": row.id,
        "name": row.name,
        "parent": row.parent or None,
        "kind": row.kind.name.lower(),
        "state": row.state,
        "created": row.created,
        "updated": row.updated,
        "labels": dict(row.labels),
        "size": row.usage.size if row.usage else None,
        "inodes": row.usage.inodes if row.usage else None,
        "device": row.device,
        "repository": row.claim.repository if row.claim else None,
        "layer": row.claim.layer.digest if row.claim else None,
    }
