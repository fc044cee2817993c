"""Connection pools: TLS settings and proxies, from explicit options and a given environment.

urllib3 and ssl cost about 0.1 s to import, so they are imported where the first pool is made.
"""

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from imgsnap.errors import InvalidArgument
from imgsnap.oci.cancellation import watch_current
from imgsnap.oci.reference import is_loopback

if TYPE_CHECKING:
    import ssl

    import urllib3

CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 60.0
"""Between two packets; a stalled transfer is then resumed elsewhere in the room."""
RANGE_TIMEOUT_S = 15.0
"""As READ_TIMEOUT_S for ranges of blobs: short enough that a read outlives one stalled transfer."""
POOL_SIZE = 32
"""Idle connections kept per host: as many as the fetcher has ranges in flight at most."""
SEND_BLOCK_SIZE = 256 << 10
"""Bytes per read of an upload's file; urllib3's default of 16 KiB costs 16 times the calls."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """How to reach a registry. `headers` go to the registry itself, never to redirect targets.

    `ca_file` is trusted instead of the system's authorities, `more_ca_files` beside them.
    `client_pairs` are certificates with their keys, None for one file that holds both. `proxy`, if
    any, replaces what the environment says.

    Raises InvalidArgument for options that contradict each other or name unsafe headers.
    """

    plain_http: bool = False
    insecure: bool = False
    ca_file: Path | None = None
    more_ca_files: tuple[Path, ...] = ()
    client_pairs: tuple[tuple[Path, Path | None], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    proxy: str = ""
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    read_timeout_s: float = READ_TIMEOUT_S

    def __post_init__(self) -> None:
        for name, value in self.headers:
            if not name.replace("-", "").isalnum() or not name.isascii():
                raise InvalidArgument(f"{name[:100]!r} is not a header name")
            if not value.isprintable() or not value.isascii():
                raise InvalidArgument(f"header {name}: the value is not printable ASCII")
            if name.lower() in ("cookie", "host", "content-length", "transfer-encoding", "range"):
                raise InvalidArgument(f"header {name} cannot be set: the transport owns it")

    def over(self, other: "ConnectionOptions") -> "ConnectionOptions":
        """These options, and the other's wherever these say nothing."""
        silent = ConnectionOptions()
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(other, **{name: v for name, v in said.items() if v != getattr(silent, name)})


class Proxies:
    """Chooses a proxy as curl does: ``https_proxy``, ``http_proxy``, ``all_proxy``, ``no_proxy``.

    Lower-case names win. Loopback never goes through a proxy.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._urls = {
            scheme: _variable(environ, f"{scheme}_proxy") or _variable(environ, "all_proxy")
            for scheme in ("http", "https")
        }
        self._exempt = [item.strip().lower() for item in _variable(environ, "no_proxy").split(",")]

    def url_for(self, scheme: str, host: str, port: int | None) -> str | None:
        """The proxy's URL for a request, or None to connect directly.

        Raises InvalidArgument for a proxy that is not http(s).
        """
        proxy = self._urls.get(scheme, "")
        if not proxy or is_loopback(f"[{host}]" if ":" in host else host):
            return None
        if any(item and _exempts(item, host.lower(), port) for item in self._exempt):
            return None
        if "://" not in proxy:
            proxy = f"http://{proxy}"
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise InvalidArgument(
                f"proxy {proxy.partition('@')[2] or proxy!r}: only http(s) proxies work here"
            )
        return proxy


class Connections:
    """Makes and keeps urllib3 pools, one manager per proxy and kind of URL. Thread safe."""

    def __init__(self, options: ConnectionOptions, environ: Mapping[str, str]) -> None:
        self._options = options
        self._proxies = Proxies(environ)
        self._ca_file = options.ca_file or _path(environ.get("SSL_CERT_FILE"))
        self._lock = threading.Lock()
        self._managers: dict[tuple[str | None, bool], urllib3.PoolManager] = {}
        self._tls: ssl.SSLContext | None = None

    def manager_for(self, url: str) -> "urllib3.PoolManager":
        """The pool manager that requests for `url` go through."""
        parts = urlsplit(url)
        proxy: str | None = self._options.proxy
        if not proxy:
            proxy = self._proxies.url_for(parts.scheme, parts.hostname or "", parts.port)
        secure = parts.scheme == "https" or (proxy or "").startswith("https:")
        with self._lock:
            if (proxy, secure) not in self._managers:
                self._managers[proxy, secure] = self._make(proxy, secure)
            return self._managers[proxy, secure]

    def prepare(self, url: str, count: int) -> None:
        """Connects in the background, so that `count` requests at once find open connections.

        Spares them the round trips of a handshake. What fails is left to the requests to meet and
        report. Not through a proxy, where connecting is more than that.
        """
        import urllib3

        manager = self.manager_for(url)
        if isinstance(manager, urllib3.ProxyManager):
            return
        pool = manager.connection_from_url(url)
        # Starting a thread takes a millisecond: the caller pays for one.
        run = partial(_connect_all, pool, count)
        threading.Thread(target=run, name="connect", daemon=True).start()

    def timeout(self, read_s: float) -> "urllib3.Timeout":
        """A request's own limit of silence, where it is shorter than the connection's."""
        import urllib3

        options = self._options
        read_s = min(read_s, options.read_timeout_s)
        return urllib3.Timeout(connect=options.connect_timeout_s, read=read_s)

    def close(self) -> None:
        """Closes idle connections; the object can be used again."""
        with self._lock:
            managers, self._managers = list(self._managers.values()), {}
        for manager in managers:
            keys = manager.pools.keys()
            for key in keys:  # clear() alone leaves them to the garbage collector
                with suppress(KeyError):
                    manager.pools[key].close()
            manager.clear()

    def _make(self, proxy: str | None, secure: bool) -> "urllib3.PoolManager":
        import urllib3

        options = self._options
        settings: dict[str, Any] = {
            "num_pools": 64,
            "maxsize": POOL_SIZE,
            "block": False,  # A thread that holds a stream may need a second connection.
            "blocksize": SEND_BLOCK_SIZE,
            "retries": False,
            "timeout": urllib3.Timeout(
                connect=options.connect_timeout_s, read=options.read_timeout_s
            ),
        }
        if secure:  # loading the authorities takes 30 ms
            settings["ssl_context"] = self._tls_context()
        if options.insecure:
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        if proxy is None:
            return _cancellable(urllib3.PoolManager(**settings))
        user = urlsplit(proxy)
        if user.username:
            pair = f"{user.username}:{user.password or ''}"
            settings["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=pair)
        return _cancellable(urllib3.ProxyManager(proxy, **settings))

    def _tls_context(self) -> "ssl.SSLContext":
        if self._tls is None:
            self._tls = _tls_context(self._options, self._ca_file)
        return self._tls


def _connect_all(pool: "urllib3.HTTPConnectionPool", count: int) -> None:
    # Idle ones come out first: nothing is opened for what is there.
    first, *others = [pool._get_conn() for _ in range(count)]
    for connection in others:
        run = partial(_connect, pool, connection)
        threading.Thread(target=run, name="connect", daemon=True).start()
    _connect(pool, first)


def _connect(pool: "urllib3.HTTPConnectionPool", connection: Any) -> None:
    try:
        if connection.is_closed:
            connection.connect()
    except Exception as error:
        connection.close()
        _log.debug("no connection in advance: %s", error)
    pool._put_conn(connection)


def _cancellable(manager: "urllib3.PoolManager") -> "urllib3.PoolManager":
    """Makes the manager's connections tell which socket their request waits on."""
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Connection(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            watch_current(self.sock)

        def request(self, *arguments: Any, **named: Any) -> None:
            watch_current(self.sock)
            super().request(*arguments, **named)

    class SecureConnection(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            watch_current(self.sock)

        def request(self, *arguments: Any, **named: Any) -> None:
            watch_current(self.sock)
            super().request(*arguments, **named)

    class Pool(HTTPConnectionPool):
        ConnectionCls = Connection

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = SecureConnection

    manager.pool_classes_by_scheme = {"http": Pool, "https": SecurePool}
    return manager


def _tls_context(options: ConnectionOptions, ca_file: Path | None) -> "ssl.SSLContext":
    import ssl

    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        for file in options.more_ca_files:
            context.load_verify_locations(str(file))
        for certificate, key in options.client_pairs:
            context.load_cert_chain(str(certificate), str(key) if key else None)
    except (OSError, ssl.SSLError) as error:
        pairs = [item for pair in options.client_pairs for item in pair]
        files = [str(item) for item in (ca_file, *options.more_ca_files, *pairs) if item]
        raise InvalidArgument(f"cannot load certificates from {', '.join(files)}: {error}") from (
            error
        )
    if options.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _exempts(item: str, host: str, port: int | None) -> bool:
    """Whether a no_proxy item covers a host: ``*``, a name, ``.suffix``, an address or a net."""
    if item == "*":
        return True
    import ipaddress

    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(item, strict=False)
    except (ValueError, TypeError):
        pass  # One of the two is a name.
    name, colon, item_port = item.rpartition(":")
    if colon and item_port.isdigit():
        if port is not None and int(item_port) != port:
            return False
        item = name
    item = item.removeprefix("*").removeprefix(".")
    return host == item or host.endswith(f".{item}")
