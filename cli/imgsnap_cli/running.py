"""Running a command in a snapshot: what `run` and `trace` share."""

import os
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import click

from imgsnap.errors import Unsupported
from imgsnap_cli.places import Places
from imgsnap_cli.settings import Settings

if TYPE_CHECKING:
    from imgsnap.blockstore.read_options import ReadOptions
    from imgsnap.mount.records import MountRecord


def bundle_directory(stack: ExitStack, settings: Settings) -> Path:
    """A directory for one run, removed with the stack."""
    settings.run.mkdir(parents=True, exist_ok=True)
    return Path(stack.enter_context(TemporaryDirectory(dir=settings.run, prefix="run-")))


class MountedRoot(NamedTuple):
    """A writable tree below a bundle directory."""

    bundle: Path
    path: Path
    record: "MountRecord"


def mount_root(
    stack: ExitStack,
    settings: Settings,
    places: Places,
    bundle: Path,
    ref: str,
    platform: str | None,
    read: "ReadOptions",
) -> MountedRoot:
    """Mounts a snapshot writably below `bundle`; the stack unmounts it. Exact reads are a block
    server's of their own."""
    from imgsnap.node.client import mount, unmount
    from imgsnap.node.session import mount_snapshot

    path = bundle / "rootfs"
    path.mkdir()
    arguments = places.mount_arguments(ref, path, platform, True, read)
    record = mount_snapshot(*arguments) if read.exact else mount(*arguments)
    stack.callback(unmount, path, settings.run, settings.cache)
    return MountedRoot(bundle, path, record)


def run_in_snapshot(
    stack: ExitStack, places: Places, root: MountedRoot, ref: str, cmd: tuple[str, ...]
) -> int:
    """Runs the image's command or `cmd` in a mounted root to its end; its exit status."""
    from imgsnap.mount import container
    from imgsnap.oci.image_config import parse_run_config

    record = root.record
    config, image_config = places.image_config(stack, ref, record.manifest_digest)
    if not container.supported_architecture(config.architecture):
        raise Unsupported(
            f"the image is for {config.architecture}; this machine is {os.uname().machine}"
        )
    parsed, files = parse_run_config(image_config), container.files_below(root.path)
    resolved = container.resolve_command(files, parsed, cmd, terminal=on_terminal())
    return container.run(root.path, resolved, root.bundle, f"imgsnap-{secrets.token_hex(6)}")


def on_terminal() -> bool:
    """Whether a command would have a terminal for both directions."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def keep_trace(text: str, output: Path) -> None:
    """Writes a recorded trace and says what is in it. Raises FormatError, OSError."""
    from imgsnap.formats.trace import parse_trace

    trace = parse_trace(text.encode())
    output.write_text(text)
    more = "" if trace.complete else "; the trace is full, what came later is not in it"
    click.echo(f"{output}: {trace.blocks} blocks in {len(trace.touches)} runs{more}", err=True)
