"""imgsnap trace"""

import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from imgsnap.errors import InvalidArgument
from imgsnap.node.client import trace_of_mount
from imgsnap_cli.places import Places, platform_option, policy_option, reading, registry_flags
from imgsnap_cli.running import bundle_directory, keep_trace, mount_root, run_in_snapshot
from imgsnap_cli.settings import Settings


class TimeOver(BaseException):
    """The time given with --for has passed. Passes through everything, as an interrupt does."""


@click.command(
    short_help="Record which blocks a start reads",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("ref", required=False)
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="imgsnap-trace.json",
    show_default=True,
    help="Where to write the trace",
)
@click.option(
    "--for",
    "seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="End the command after this time [when it ends]",
)
@click.option(
    "--mounted",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path),
    help="What has been read so far from a mounted snapshot, instead of running a command",
)
@platform_option
@policy_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str | None,
    cmd: tuple[str, ...],
    output: Path,
    seconds: float | None,
    mounted: Path | None,
    platform: str | None,
    **flags: Any,
) -> int:
    """Run the command of the image behind REF, or CMD after --, and record what it reads.

    With --mounted nothing is run: the mount's server tells what was read so far, which the kernel's
    readahead may have made more than was used.

    The trace names blocks of extents in the order of their first reads, and nothing else: no paths
    and no contents. It is written when the command ends, is interrupted, or its time is over. The
    exit code is the command's; 0 when its time was over. `imgsnap optimize` makes a boot pack of
    traces.
    """
    if mounted is not None:
        if ref is not None:
            raise InvalidArgument("give a reference or --mounted, not both")
        keep_trace(trace_of_mount(mounted, settings.run), output)
        return 0
    if ref is None:
        raise InvalidArgument("name a snapshot, or a mounted one with --mounted")
    places = Places(settings, flags)
    with ExitStack() as stack:
        bundle = bundle_directory(stack, settings)
        read = reading((), image_config=True, exact=True)
        root = mount_root(stack, settings, places, bundle, ref, platform, read)
        stack.callback(lambda: keep_trace(trace_of_mount(root.path, settings.run), output))
        if seconds is not None:
            signal.signal(signal.SIGALRM, _time_over)
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(TimeOver):
            return run_in_snapshot(stack, places, root, ref, cmd)
    return 0


def _time_over(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeOver
