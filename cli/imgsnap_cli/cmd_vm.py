"""imgsnap vm"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from imgsnap.errors import Busy, InvalidArgument, Unsupported
from imgsnap.units import MIB, parse_size
from imgsnap_cli.output import SCHEMA
from imgsnap_cli.places import (
    Places,
    boot_pack_names,
    boot_pack_option,
    platform_option,
    policy_option,
    reading,
    reading_flags,
    registry_flags,
)
from imgsnap_cli.running import keep_trace, on_terminal
from imgsnap_cli.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])

if TYPE_CHECKING:
    from imgsnap.blockstore.read_options import ReadOptions
    from imgsnap.mount.container import Command
    from imgsnap.vm.run import TimeLine, Wanted


_MACHINE = (
    click.option(
        "--memory", metavar="SIZE", default="512MiB", show_default=True, help="Of the guest"
    ),
    click.option(
        "--cpus", type=click.IntRange(1, 64), default=1, show_default=True, help="Of the guest"
    ),
    click.option(
        "--kernel",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="bzImage [newest in /boot]",
    ),
    click.option(
        "--modules",
        metavar="DIR",
        type=click.Path(path_type=Path),
        help="The kernel's [/lib/modules/VERSION]",
    ),
    click.option("--net", is_flag=True, help="A network interface, connected with this machine"),
    click.option(
        "--scratch", metavar="SIZE", help="Keep changes on a disk of this size [in memory]"
    ),
    click.option(
        "--timeout",
        metavar="SECONDS",
        type=click.FloatRange(min=0, min_open=True),
        help="End it after this time, the boot included",
    ),
    click.option("--emulate", is_flag=True, help="Do not use KVM"),
)
_MACHINE_NAMES = ("memory", "cpus", "kernel", "modules", "net", "scratch", "timeout", "emulate")


def machine_flags(function: F) -> F:
    """Adds what can be said about the machine; the command hands it to `_wanted` as it comes."""
    for option in reversed(_MACHINE):
        function = option(function)
    return function


@click.group(short_help="Run images in microVMs")
def command() -> None:
    """Run images in microVMs that boot from their snapshots."""


@command.command(
    short_help="Boot a snapshot and run a command in it",
    context_settings={"ignore_unknown_options": False},
)
@click.argument("ref")
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@machine_flags
@click.option(
    "--trace",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Record what is read, for `imgsnap optimize`",
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write when what happened and what was fetched, as JSON",
)
@boot_pack_option
@platform_option
@reading_flags
@policy_option
@registry_flags
@click.pass_obj
def run(
    settings: Settings,
    /,
    ref: str,
    cmd: tuple[str, ...],
    trace: Path | None,
    report: Path | None,
    boot_pack: str | None,
    platform: str | None,
    prefetch: str,
    prefetch_rate: str | None,
    **flags: Any,
) -> int:
    """Boot a microVM from the snapshot REF; run its image's command in it, or CMD after --.

    The snapshot is attached as the guest's read-only disk and fetched as it is read; changes are
    dropped at the end. Environment, working directory and user are the image's. The exit code is
    the command's. A terminal is the command's terminal; without one it has no input.
    """
    wanted = _wanted(**{name: flags.pop(name) for name in _MACHINE_NAMES})
    if trace is not None:
        read = reading((), image_config=True)
    else:
        read = reading(boot_pack_names(boot_pack), prefetch, prefetch_rate, image_config=True)
    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # a closed terminal
    return _Run(settings, Places(settings, flags), ref, platform).run(
        wanted, cmd, read, trace, report
    )


def _wanted(
    memory: str,
    cpus: int,
    kernel: Path | None,
    modules: Path | None,
    net: bool,
    scratch: str | None,
    timeout: float | None,
    emulate: bool,
) -> "Wanted":
    """The machine's options as the library has them. Raises InvalidArgument."""
    from imgsnap.vm.run import Wanted

    return Wanted(
        memory_mib=_size("--memory", memory) // MIB,
        cpus=cpus,
        kernel=kernel,
        modules=modules,
        network=net,
        scratch=None if scratch is None else _size("--scratch", scratch),
        limit_s=timeout,
        emulate=emulate,
    )


class _Run:
    """One run of a snapshot."""

    def __init__(self, settings: Settings, places: Places, ref: str, platform: str | None) -> None:
        self._settings = settings
        self._places = places
        self._ref = ref
        self._platform = platform

    def run(
        self,
        wanted: "Wanted",
        cmd: tuple[str, ...],
        read: "ReadOptions",
        trace: Path | None,
        report: Path | None,
    ) -> int:
        from imgsnap.vm import run

        state = self._settings.run / "vm"
        tools = run.prepare(wanted, state, _say)
        with ExitStack() as stack:
            line = run.TimeLine()
            attached = self._attach(stack, read, alone=trace is not None)
            line.mark("attached")
            disk, digest = Path(attached["path"]), attached["manifest_digest"]
            command = self._command(stack, disk, digest, cmd)
            status = run.run(tools, wanted, disk, command, state, _say, line, _print)
            if trace is not None:
                from imgsnap.node.client import trace_of_attachment

                keep_trace(trace_of_attachment(attached["id"], self._settings.run), trace)
            if report is not None:
                self._write_report(report, attached["id"], status, line)
        return status

    def _attach(self, stack: ExitStack, read: "ReadOptions", *, alone: bool) -> dict[str, Any]:
        from imgsnap.mount.process import ProcessId
        from imgsnap.node.client import daemon_call, release

        me = ProcessId.of(os.getpid())
        stack.callback(release, self._settings.run, me)
        attached = self._places.attach(self._ref, self._platform, read, process=me)
        if alone:
            known = daemon_call(self._settings.run, "attachments")
            users = next(item["users"] for item in known if item["id"] == attached["id"])
            if users > 1:
                raise Busy(
                    "the snapshot is attached already: what was read before cannot be recorded",
                    hint="detach it first; imgsnap attachments lists what is attached",
                )
        return attached

    def _command(
        self, stack: ExitStack, disk: Path, digest: str, cmd: tuple[str, ...]
    ) -> "Command":
        from imgsnap.mount.container import resolve_command
        from imgsnap.oci.image_config import parse_run_config
        from imgsnap.vm.image_files import files_on
        from imgsnap.vm.run import ARCHITECTURE

        config, image_config = self._places.image_config(stack, self._ref, digest)
        if config.architecture not in (ARCHITECTURE, "386"):
            raise Unsupported(
                f"the image is for {config.architecture}; guests here are {ARCHITECTURE}",
                hint="convert the image for linux/amd64",
            )
        parsed = parse_run_config(image_config)
        return resolve_command(files_on(disk), parsed, cmd, terminal=on_terminal())

    def _write_report(self, path: Path, attachment_id: str, status: int, line: "TimeLine") -> None:
        from imgsnap.node.client import statistics_of_attachment

        value = {
            "schema": SCHEMA,
            "status": status,
            "seconds": line.seconds,
            "reads": statistics_of_attachment(attachment_id, self._settings.run),
        }
        path.write_text(json.dumps(value, indent=2) + "\n")


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise InvalidArgument(f"{option}: {error}", hint="for example 1GiB") from error


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _say(text: str) -> None:
    click.echo(f"imgsnap: {text}", err=True)
