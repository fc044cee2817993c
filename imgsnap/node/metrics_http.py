"""Metrics over HTTP: `/metrics` for Prometheus and `/healthz` for probes, GET only.

Nothing here can disturb readers: at most REQUESTS_MAX requests at a time, in a process that serves
no reads, and the block server is asked with a short deadline.
"""

import errno
import logging
import os
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from imgsnap import __version__
from imgsnap.blockstore.cache_quota import quota
from imgsnap.blockstore.cache_usage import by_kind, scan
from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.errors import Busy, ImgsnapError, InvalidArgument
from imgsnap.mount.records import MOUNTED, MountRecords
from imgsnap.node import rpc
from imgsnap.node.metrics import NodeState, render
from imgsnap.node.places import NodePlaces
from imgsnap.node.process_usage import process_usage
from imgsnap.node.prometheus import CONTENT_TYPE

REQUESTS_MAX = 8
REQUEST_TIMEOUT_S = 10.0
SERVER_TIMEOUT_S = 2.0
"""A block server that does not answer by then counts as down."""
CACHE_AGE_S = 60.0
"""How long the size of the node cache is believed: to find it out, all of it is walked."""
LOOPBACK = "127.0.0.1"
_log = logging.getLogger(__name__)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``ADDRESS:PORT``, ``[IPV6]:PORT``, ``:PORT`` or ``PORT``; loopback when
    there is no address. Raises InvalidArgument."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    bad = (":" in host and bare == host) or (colon and host and not bare)
    if bad or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 1 << 16:
        raise InvalidArgument(
            f"{text!r} is no address to serve metrics on", hint="for example 127.0.0.1:9477"
        )
    return bare or LOOPBACK, int(port)


class Observed(Protocol):
    """What a server shows; called by several threads."""

    def page(self) -> str:
        """The metrics. Does not raise: what is down is a value."""

    def problem(self) -> str | None:
        """Why a probe should fail; None when all is well."""


class Observer:
    """Finds out the state of the node for each scrape. Safe for threads."""

    def __init__(self, run_dir: Path, cache_dir: Path, cache_quota: int | None) -> None:
        """`cache_quota` in bytes, in place of the one kept with the cache."""
        self._places = NodePlaces(run_dir)
        self._records = MountRecords(run_dir)
        self._cache_dir = cache_dir
        self._cache_quota = cache_quota
        self._lock = threading.Lock()
        self._sizes: dict[str, int] | None = None
        self._quota: int | None = None
        self._looked = float("-inf")

    def page(self) -> str:
        """See `Observed.page`."""
        return render(self.state())

    def problem(self) -> str | None:
        """See `Observed.problem`."""
        return None if self.server() is not None else "the block server does not answer"

    def state(self) -> NodeState:
        """Never raises for what is down: that is what the metrics are for."""
        server = self.server()
        supervisor = self._ask(self._places.server.supervisor_socket)
        sizes, limit = self._cache()
        pids = {
            "control": os.getpid(),
            "supervisor": (supervisor or {}).get("pid"),
            "block": (server or {}).get("pid"),
        }
        return NodeState(
            version=__version__,
            server=server,
            supervisor=supervisor,
            attachments=self._attachments(),
            mounts=self._mounts(),
            cache=sizes,
            quota=limit,
            processes={name: process_usage(pid) for name, pid in pids.items() if pid},
        )

    def server(self) -> dict[str, Any] | None:
        """The block server's status; None when it does not answer."""
        return self._ask(self._places.server.block_socket)

    def _ask(self, path: Path) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = rpc.call(path, "status", timeout_s=SERVER_TIMEOUT_S)
        except ImgsnapError:
            return None
        return found

    def _attachments(self) -> int | None:
        """Counted on disk, so it is known without the block server."""
        try:
            return sum(1 for _ in (self._places.server.attachments / "id").glob("*.json"))
        except OSError:
            return None

    def _mounts(self) -> dict[str, int]:
        found = Counter(
            "none" if record.direct else "daemon" if record.by_daemon else "private"
            for record in self._records.all()
            if record.state == MOUNTED
        )
        return {kind: found[kind] for kind in ("daemon", "private", "none")}

    def _cache(self) -> tuple[dict[str, int] | None, int | None]:
        with self._lock:
            if time.monotonic() - self._looked >= CACHE_AGE_S:
                try:
                    cache = NodeCache(self._cache_dir, quota=self._cache_quota)
                    self._sizes, self._quota = by_kind(scan(cache)), quota(cache)
                except (ImgsnapError, OSError) as error:
                    _log.warning("the size of the node cache is not known: %s", error)
                    self._sizes, self._quota = None, None
                self._looked = time.monotonic()
            return self._sizes, self._quota


class MetricsServer(ThreadingHTTPServer):
    """Answers until the process ends. Threads are daemons."""

    daemon_threads = True

    def __init__(self, address: str, observed: Observed) -> None:
        """Listens at once. Raises InvalidArgument for no address, Busy when it is taken, OSError
        for what cannot be listened on."""
        host, port = parse_address(address)
        self.observed = observed
        self._slots = threading.BoundedSemaphore(REQUESTS_MAX)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Busy(f"cannot serve metrics on {address}: it is taken by others") from error
            raise InvalidArgument(f"cannot serve metrics on {address}: {error.strerror}") from error

    def server_bind(self) -> None:
        """As the base does without asking a resolver for this machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "localhost", self.socket.getsockname()[1]

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, name="metrics", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Too many at once are refused: a scraper comes again."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a scraper went away", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server: MetricsServer
    server_version = "imgsnap"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(200, self.server.observed.page(), CONTENT_TYPE)
        elif path == "/healthz":
            problem = self.server.observed.problem()
            self._answer(503 if problem else 200, f"{problem or 'ok'}\n")
        else:
            self._answer(404, "only /metrics and /healthz are here\n")

    def _answer(self, code: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
