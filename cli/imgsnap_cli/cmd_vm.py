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
    from imgsnap.formats.snapshot_config import SnapshotConfig
    from imgsnap.mount.container import Command, ReadFile
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
    click.option(
        "--root-hash", metavar="HEX", help="Take only a snapshot with this dm-verity root hash"
    ),
    click.option(
        "--dax", is_flag=True, help="Map the snapshot into the guest; it must be cached whole"
    ),
)
_MACHINE_NAMES = (
    *("memory", "cpus", "kernel", "modules", "net", "scratch", "timeout", "emulate"),
    *("root_hash", "dax"),
)


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
@click.option(
    "--via",
    type=click.Choice(["fuse", "ublk"]),
    default="fuse",
    show_default=True,
    help="What QEMU opens: a file, or a disk /dev/ublkbN",
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
    via: str,
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

    If the snapshot has a dm-verity hash tree (imgsnap convert --verity), the guest verifies every
    block it reads; what is not right is an I/O error.
    """
    wanted = _wanted(**{name: flags.pop(name) for name in _MACHINE_NAMES})
    if wanted.dax and via == "ublk":
        raise InvalidArgument("--dax maps a file, not a disk", hint="leave out --via ublk")
    if wanted.dax and trace is not None:
        raise InvalidArgument(
            "--trace records what a guest reads; with --dax pages are mapped around it, too",
            hint="record without --dax",
        )
    if trace is not None:
        read = reading((), image_config=True)
    else:
        read = reading(boot_pack_names(boot_pack), prefetch, prefetch_rate, image_config=True)
    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))  # a closed terminal
    return _Run(settings, Places(settings, flags), ref, platform, via).run(
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
    root_hash: str | None,
    dax: bool,
) -> "Wanted":
    """The machine's options as the library has them. Raises InvalidArgument."""
    from imgsnap.vm.run import Wanted
    from imgsnap.vm.verity import check_root_hash

    return Wanted(
        memory_mib=_size("--memory", memory) // MIB,
        cpus=cpus,
        kernel=kernel,
        modules=modules,
        network=net,
        scratch=None if scratch is None else _size("--scratch", scratch),
        limit_s=timeout,
        emulate=emulate,
        root_hash=None if root_hash is None else check_root_hash(root_hash),
        dax=dax,
    )


class _Run:
    """One run of a snapshot."""

    def __init__(
        self, settings: Settings, places: Places, ref: str, platform: str | None, via: str
    ) -> None:
        self._settings = settings
        self._places = places
        self._ref = ref
        self._platform = platform
        self._via = via

    def run(
        self,
        wanted: "Wanted",
        cmd: tuple[str, ...],
        read: "ReadOptions",
        trace: Path | None,
        report: Path | None,
    ) -> int:
        from imgsnap.vm import run
        from imgsnap.vm.image_files import files_on
        from imgsnap.vm.verity import verified_root

        state = self._settings.run / "vm"
        tools = run.prepare(wanted, state, _say)
        with ExitStack() as stack:
            line = run.TimeLine()
            attached = self._attach(stack, read, alone=trace is not None)
            line.mark("attached")
            disk, digest = Path(attached["path"]), attached["manifest_digest"]
            config, image_config = self._places.image_config(stack, self._ref, digest)
            root = verified_root(config, wanted.root_hash)
            if root is not None:
                tools = run.with_verity(tools, wanted)
            if wanted.dax:
                self._check_mappable(digest, verified=root is not None)
            command = _command(config, image_config, files_on(disk, root), cmd)
            status = run.run(tools, wanted, disk, root, command, state, _say, line, _print)
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
        attached = self._places.attach(self._ref, self._platform, read, process=me, via=self._via)
        if alone:
            known = daemon_call(self._settings.run, "attachments")
            users = next(item["users"] for item in known if item["id"] == attached["id"])
            if users > 1:
                raise Busy(
                    "the snapshot is attached already: what was read before cannot be recorded",
                    hint="detach it first; imgsnap attachments lists what is attached",
                )
        return attached

    def _check_mappable(self, digest: str, *, verified: bool) -> None:
        """A page that cannot be fetched would end the guest. What is attached is not evicted."""
        if verified:
            raise Unsupported(
                "--dax would go past dm-verity, and the snapshot has a hash tree",
                hint="leave out --dax, or convert the image without --verity",
            )
        with ExitStack() as stack:
            snapshot = self._places.any_snapshot(stack, self._ref, None, digest)
            reader = stack.enter_context(self._places.block_reader(snapshot))
            if not reader.local:
                raise Unsupported(
                    "--dax takes snapshots that are in the node's cache as a whole",
                    hint=f"fetch it first: imgsnap warm {self._ref}",
                )

    def _write_report(self, path: Path, attachment_id: str, status: int, line: "TimeLine") -> None:
        from imgsnap.node.client import statistics_of_attachment

        value = {
            "schema": SCHEMA,
            "status": status,
            "seconds": line.seconds,
            "reads": statistics_of_attachment(attachment_id, self._settings.run),
        }
        path.write_text(json.dumps(value, indent=2) + "\n")


def _command(
    config: "SnapshotConfig", image_config: bytes, read: "ReadFile", cmd: tuple[str, ...]
) -> "Command":
    from imgsnap.mount.container import resolve_command
    from imgsnap.oci.image_config import parse_run_config
    from imgsnap.vm.run import ARCHITECTURE

    if config.architecture not in (ARCHITECTURE, "386"):
        raise Unsupported(
            f"the image is for {config.architecture}; guests here are {ARCHITECTURE}",
            hint="convert the image for linux/amd64",
        )
    parsed = parse_run_config(image_config)
    return resolve_command(read, parsed, cmd, terminal=on_terminal())


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
