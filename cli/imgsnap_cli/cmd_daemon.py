"""imgsnap daemon"""

import click

from imgsnap_cli.output import format_option, print_json, print_table
from imgsnap_cli.places import policy_option, quota
from imgsnap_cli.settings import Settings


@click.group(short_help="Run and look after the node daemon")
def command() -> None:
    """One daemon serves all snapshots of a node; commands use it when it runs.

    It has three processes: a control process that answers commands, a small supervisor that holds
    the kernel's side, and a block server that answers reads. Each may end, be killed or be
    upgraded at any time: mounts stay, and reads wait for a moment.
    """


@command.command(short_help="Run the daemon in the foreground")
@click.option(
    "--metrics", metavar="[ADDRESS:]PORT", help="Serve metrics over HTTP there [IMGSNAP_METRICS]"
)
@policy_option
@click.pass_obj
def run(settings: Settings, /, metrics: str | None) -> int:
    """Answer commands until SIGTERM. What is mounted stays mounted and is served on.

    Takes its socket from systemd when that started it, and says when it is ready (Type=notify).
    Metrics are at /metrics and a probe at /healthz, on loopback when no ADDRESS is given.
    """
    from imgsnap.node.daemon import run_daemon

    metrics = metrics or settings.metrics
    return run_daemon(settings.run, settings.cache, quota(settings), metrics, settings.policy)


@command.command(short_help="Run the supervisor in the foreground (for service managers)")
@click.pass_obj
def supervise(settings: Settings) -> int:
    """Hold the FUSE device and keep a block server alive.

    The daemon starts one by itself when there is none. Under systemd it is a service of its own,
    whose descriptors survive its restart in systemd's store.
    """
    from imgsnap.node.supervise import run_supervisor

    return run_supervisor(settings.run, settings.cache, quota(settings))


@command.command(short_help="Show the daemon's processes and attachments")
@format_option
@click.pass_obj
def status(settings: Settings, /, format_: str) -> None:
    """Show processes, versions and attached snapshots."""
    from imgsnap.node.client import daemon_call

    found = daemon_call(settings.run, "status")
    found["attachments"] = daemon_call(settings.run, "attachments")
    if format_ == "json":
        print_json(found)
        return
    supervisor = found["supervisor"] or {}
    print_table(
        ("PROCESS", "PID", "VERSION"),
        [
            ("control", str(found["pid"]), found["version"]),
            ("supervisor", str(supervisor.get("pid", "-")), supervisor.get("version", "-")),
            ("block server", str(supervisor.get("server", "-")), supervisor.get("version", "-")),
        ],
    )
    if found["attachments"]:
        click.echo()
        print_table(
            ("SNAPSHOT", "REPOSITORY", "USERS"),
            [
                (item["manifest_digest"][:19], item["repository"], str(item["users"]))
                for item in found["attachments"]
            ],
        )


@command.command(short_help="Switch to the installed version without disturbing readers")
@format_option
@click.pass_obj
def upgrade(settings: Settings, /, format_: str) -> None:
    """Replace control process, supervisor and block server by what is installed now.

    What is mounted stays; reads wait for a moment. Nothing changes when the installed version
    does not start.
    """
    from imgsnap.node.daemon import upgrade as upgrade_daemon

    done = upgrade_daemon(settings.run)
    if format_ == "json":
        print_json(done)
    else:
        click.echo(f"upgraded from {done['from']} to {done['to']}")


@command.command(short_help="Stop the daemon and its block server")
@click.option("--force", is_flag=True, help="Also when snapshots are mounted: they are detached")
@click.pass_obj
def stop(settings: Settings, /, force: bool) -> None:
    """Stop all of the daemon's processes. Refused while snapshots are mounted."""
    from imgsnap.node.daemon import stop_daemon

    stop_daemon(settings.run, settings.cache, force=force)
