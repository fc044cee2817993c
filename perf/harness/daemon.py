"""A node daemon for benchmarks, and mounting through it as a long-lived program would."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from harness.client import Client
from harness.processes import child_environment, end, output_of, running
from harness.product import open_places
from imgsnap.node import client as node_client
from imgsnap_cli.places import boot_pack_names, reading

START_S = 20.0


@contextmanager
def node_daemon(client: Client) -> Iterator[None]:
    """The daemon of a client's directories, until the block is left."""
    with running(client.command("daemon", "run"), env=child_environment()) as process:
        deadline = time.monotonic() + START_S
        while True:
            status = node_client.find_daemon(client.run_dir)
            if status is not None and status["supervisor"] is not None:
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise SystemExit("error: the node daemon does not start")
            time.sleep(0.01)
        try:
            yield
        finally:
            output_of(client.command("daemon", "stop", "--force"))
            end(process)


@contextmanager
def mounted_by_daemon(
    client: Client,
    reference: str,
    target: Path,
    boot_pack: str | None,
    *,
    one_file: bool = False,
) -> Iterator[float]:
    """A mount by one call, without the start of a command; seconds that it took.

    With `one_file` it is served though it could be mounted from the cache's files.
    """
    places, settings = open_places(str(client.store), str(client.cache), str(client.run_dir))
    read = reading(boot_pack_names(boot_pack), "off")
    options, opened = places.mount_arguments(reference, target, None, False, read)
    started = time.perf_counter()
    record = node_client.mount(replace(options, one_file=one_file), opened)
    try:
        yield time.perf_counter() - started
    finally:
        node_client.unmount(target, settings.run, settings.cache)
    if not record.by_daemon:
        raise SystemExit("error: the daemon was not used")
