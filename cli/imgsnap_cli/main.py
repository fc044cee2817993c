"""Entry point: the command group, global options, and how errors leave the process."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from imgsnap import __version__
from imgsnap.errors import ImgsnapError
from imgsnap_cli.settings import Settings

COMMANDS = {
    "attach": "Attach a snapshot as a block source for VMs",
    "attachments": "List attached snapshots",
    "cache": "Look after the node's cache: sizes, quota, pins, check",
    "cat": "Print a file of a snapshot",
    "check": "Verify a snapshot, optionally against its source image",
    "completion": "Print a shell completion script",
    "config": "Print configuration for other programs",
    "convert": "Convert an OCI image to a snapshot",
    "daemon": "Run and look after the node daemon",
    "detach": "Detach what was attached",
    "doctor": "Say what this machine can do and what to install",
    "du": "Show what a snapshot takes in its store",
    "explain": "Show what a mounted snapshot's reads waited for",
    "files": "List the files of a snapshot",
    "gc": "Delete snapshots and layers that no tag leads to",
    "info": "Show an attached snapshot and who uses it",
    "inspect": "Show what a snapshot is made of",
    "ls": "List snapshots in the local store or a repository",
    "mount": "Mount a snapshot on a directory",
    "mounts": "List mounted snapshots",
    "optimize": "Make a boot pack of recorded starts",
    "pull": "Copy a snapshot to the local store, or an image with one to containerd",
    "push": "Copy a snapshot from the local store to a registry",
    "run": "Run a command with a snapshot as its root",
    "snapshotter": "Run and look after the containerd snapshotter",
    "trace": "Record which blocks a start reads",
    "umount": "Unmount a snapshot",
    "verify": "Show who signed a snapshot, and check it by a policy",
    "version": "Print versions",
    "vm": "Run images in microVMs",
    "warm": "Fill the node's cache with a snapshot",
}
"""Each lives in its own module and is imported only when it is used: `imgsnap --help` and every
command pay for their own imports alone."""


class ReaderGone(Exception):
    """Nobody reads our output any more."""


class LazyGroup(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"imgsnap_cli.cmd_{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ReaderGone from error  # click would make it exit code 1

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"no command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--store", metavar="DIR", help="Local store [IMGSNAP_STORE, /var/lib/imgsnap/store]")
@click.option("--cache-dir", metavar="DIR", help="Node cache [IMGSNAP_CACHE_DIR]")
@click.option("--cache-quota", metavar="SIZE", help="Most it may take [IMGSNAP_CACHE_QUOTA]")
@click.option("--run-dir", metavar="DIR", help="Sockets and mount records [IMGSNAP_RUN_DIR]")
@click.option("-v", "--verbose", is_flag=True, help="Log what is being done")
@click.option("--debug", is_flag=True, help="Log everything; show tracebacks")
@click.version_option(__version__, message="imgsnap %(version)s")
@click.pass_context
def cli(
    ctx: click.Context,
    store: str | None,
    cache_dir: str | None,
    cache_quota: str | None,
    run_dir: str | None,
    verbose: bool,
    debug: bool,
) -> None:
    """Lazily loaded, deduplicated block snapshots of OCI images.

    A place is REGISTRY/REPOSITORY[:TAG][@DIGEST], store:NAME[:TAG] (the local store) or
    oci:DIR[:TAG] (an image layout); sources of convert may also be oci-archive:FILE and
    docker-archive:FILE.
    """
    _start_logging("DEBUG" if debug else "INFO" if verbose else "WARNING")
    ctx.obj = Settings.make(
        os.environ, store=store, cache=cache_dir, run=run_dir, cache_quota=cache_quota
    )


def _start_logging(level: str) -> None:
    import logging

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return f"{record.levelname.lower()}: {record.getMessage()}"

    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logger = logging.getLogger("imgsnap")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds the stack, so that everything held is given back."""
    raise SystemExit(128 + signum)


def _fail(message: str, hint: str | None, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit code. See docs/cli.md for the codes."""
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments
    signal.signal(signal.SIGTERM, _terminate)
    try:
        result: Any = cli.main(args=arguments, prog_name="imgsnap", standalone_mode=False)
        sys.stdout.flush()
    except ImgsnapError as error:
        if debug:
            raise
        return _fail(_one_line(error), error.hint, error.exit_code)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "imgsnap"
        return _fail(error.format_message(), f"see: {command} --help", 2)
    except click.ClickException as error:
        return _fail(error.format_message(), None, 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", None, 130)
    except (ReaderGone, BrokenPipeError):
        # The reader of our output has gone: as other tools do, stop without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", None, 1)
    except Exception as error:
        if debug:
            raise
        message = f"internal error: {type(error).__name__}: {_one_line(error)}"
        return _fail(message, "this is a defect; run again with --debug to see where", 1)
    return result if isinstance(result, int) else 0


def entry() -> NoReturn:
    """The `imgsnap` script."""
    try:
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    sys.stderr.flush()
    # Everything held has been given back. Threads that hang on a registry would be waited for.
    os._exit(code)
