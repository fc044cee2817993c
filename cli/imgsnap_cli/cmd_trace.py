"""imgsnap trace"""

import shutil
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from imgsnap_cli.places import Places, platform_option, registry_flags
from imgsnap_cli.running import bundle_directory, run_in_snapshot
from imgsnap_cli.settings import Settings


class TimeOver(BaseException):
    """The time given with --for has passed. Passes through everything, as an interrupt does."""


@click.command(
    short_help="Record which blocks a start reads",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("ref")
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
@platform_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    ref: str,
    cmd: tuple[str, ...],
    output: Path,
    seconds: float | None,
    platform: str | None,
    **flags: Any,
) -> int:
    """Run the command of the image behind REF, or CMD after --, and record what it reads.

    The trace names blocks of extents in the order of their first reads, and nothing else: no paths
    and no contents. It is written when the command ends, is interrupted, or its time is over. The
    exit code is the command's; 0 when its time was over. `imgsnap optimize` makes a boot pack of
    traces.
    """
    places = Places(settings, flags)
    with ExitStack() as stack:
        bundle = bundle_directory(stack, settings)
        written = bundle / "trace.json"
        stack.callback(_keep, written, output)  # after the unmount, which lets it be written
        if seconds is not None:
            signal.signal(signal.SIGALRM, _time_over)
            stack.callback(signal.setitimer, signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        with suppress(TimeOver):
            return run_in_snapshot(
                stack,
                settings,
                places,
                bundle,
                ref,
                cmd,
                platform,
                boot_pack=(),
                trace_path=written,
            )
    return 0


def _time_over(signum: int, frame: FrameType | None) -> NoReturn:
    raise TimeOver


def _keep(written: Path, output: Path) -> None:
    """The server's trace to where the user wants it; none when nothing was mounted."""
    from imgsnap.formats.trace import parse_trace

    if not written.exists():
        return
    trace = parse_trace(written.read_bytes())
    shutil.copyfile(written, output)
    more = "" if trace.complete else "; the trace is full, what came later is not in it"
    click.echo(f"{output}: {trace.blocks} blocks in {len(trace.touches)} runs{more}", err=True)
