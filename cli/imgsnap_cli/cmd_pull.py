"""imgsnap pull"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from imgsnap_cli.copying import copy
from imgsnap_cli.places import Places, platform_option, policy_option, registry_flags
from imgsnap_cli.progress import progress_option
from imgsnap_cli.settings import Settings


@click.command(short_help="Copy a snapshot to the local store, or an image with one to containerd")
@click.argument("ref")
@click.argument("name", required=False)
@click.option("--containerd", is_flag=True, help="Into containerd, without the layers")
@click.option("--namespace", metavar="NAME", help="containerd's [CONTAINERD_NAMESPACE, default]")
@click.option("--address", metavar="SOCKET", help="containerd's [CONTAINERD_ADDRESS]")
@click.option("--snapshotter", metavar="NAME", help="Our name in containerd [imgsnap]")
@platform_option
@progress_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    name: str | None,
    containerd: bool,
    namespace: str | None,
    address: str | None,
    snapshotter: str | None,
    platform: str | None,
    progress: str,
    **flags: Any,
) -> None:
    """Copy the whole snapshot REF to the local store, as store:NAME.

    Without NAME it keeps the repository's own name and tag. To fill the node's cache instead, use
    `imgsnap warm`.

    With --containerd, REF is an image that has a snapshot. containerd gets the image, and instead
    of its layers the snapshot, through the running snapshotter; exit code 4 if it has none.
    """
    if containerd:
        if name is not None:
            raise click.UsageError("--containerd takes no NAME: the image keeps its own")
        options = {"namespace": namespace, "address": address, "snapshotter": snapshotter}
        _into_containerd(settings, flags, ref, platform, options)
        return
    if namespace or address or snapshotter or platform:
        raise click.UsageError("--namespace, --address, --snapshotter, --platform: --containerd's")
    admit = Places(settings, flags).admission() if settings.policy is not None else None
    copy(settings, flags, ref, name or default_name(ref), progress, admit)


def _into_containerd(
    settings: Settings,
    flags: dict[str, Any],
    ref: str,
    platform: str | None,
    options: dict[str, str | None],
) -> None:
    from imgsnap.containerd.config import PLUGIN
    from imgsnap.errors import InvalidReference
    from imgsnap.oci.platforms import parse_platform
    from imgsnap.oci.reference import RegistryLocation, parse_location
    from imgsnap.snapshotter.pull import Containerd, pull
    from imgsnap.snapshotter.pulled_image import read_image

    location = parse_location(ref)
    if not isinstance(location, RegistryLocation):
        raise InvalidReference(f"{ref} is not in a registry", hint="REGISTRY/REPOSITORY[:TAG]")
    address = options["address"]
    namespace = options["namespace"] or settings.environ.get("CONTAINERD_NAMESPACE")
    place = Containerd(
        address=Path(address).absolute() if address else settings.containerd,
        namespace=namespace or "default",
        snapshotter=options["snapshotter"] or PLUGIN,
    )
    with ExitStack() as stack:
        repository, _ = Places(settings, flags).reader(stack, ref)
        image = read_image(repository, location, parse_platform(platform) if platform else None)
    pull(image, place)
    click.echo(f"{image.name}@{image.target.digest}")


def default_name(ref: str) -> str:
    """``registry.example/team/app:1.0`` becomes ``store:app:1.0``."""
    from imgsnap.errors import InvalidArgument
    from imgsnap.oci.reference import RegistryLocation, parse_location

    location = parse_location(ref)
    if not isinstance(location, RegistryLocation) or location.tag is None:
        raise InvalidArgument(
            f"{ref} has no repository and tag to take a name from",
            hint="give one: imgsnap pull REF store:NAME:TAG",
        )
    return f"store:{location.repository.rpartition('/')[2]}:{location.tag}"
