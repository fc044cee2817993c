"""Running a command in a snapshot: what `run` and `trace` share."""

import os
import secrets
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.errors import Unsupported
from imgsnap_cli.places import Places
from imgsnap_cli.settings import Settings


def bundle_directory(stack: ExitStack, settings: Settings) -> Path:
    """A directory for one run, removed with the stack."""
    settings.run.mkdir(parents=True, exist_ok=True)
    return Path(stack.enter_context(TemporaryDirectory(dir=settings.run, prefix="run-")))


def run_in_snapshot(
    stack: ExitStack,
    settings: Settings,
    places: Places,
    bundle: Path,
    ref: str,
    cmd: tuple[str, ...],
    platform: str | None,
    *,
    boot_pack: tuple[str, ...],
    trace_path: Path | None = None,
) -> int:
    """Mounts a snapshot writably below `bundle`, runs the image's command or `cmd` in it to its
    end, and returns its exit status. The stack unmounts."""
    from imgsnap.mount import container
    from imgsnap.mount.session import mount_snapshot, unmount
    from imgsnap.oci.image_config import parse_run_config

    root = bundle / "rootfs"
    root.mkdir()
    arguments = places.mount_arguments(
        ref,
        root,
        platform,
        True,
        boot_pack=boot_pack,
        image_config=True,
        trace_path=trace_path,
    )
    record = mount_snapshot(*arguments)
    stack.callback(unmount, root, settings.run)
    config, image_config = places.image_config(stack, ref, record.manifest_digest)
    if not container.supported_architecture(config.architecture):
        raise Unsupported(
            f"the image is for {config.architecture}; this machine is {os.uname().machine}"
        )
    resolved = container.resolve_command(
        root, parse_run_config(image_config), cmd, terminal=_on_terminal()
    )
    return container.run(root, resolved, bundle, f"imgsnap-{secrets.token_hex(6)}")


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()
