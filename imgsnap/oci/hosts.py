"""containerd's hosts.toml: which hosts to ask for a registry's images, in which order, and how.

Source: containerd, docs/hosts.md and core/remotes/docker/config. Of a directory (containerd's
default is /etc/containerd/certs.d) the first of ``HOST_PORT_``, ``HOST:PORT`` and ``_default`` that
holds a hosts.toml is used. Docker's pattern of bare certificate files is not.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from imgsnap.errors import InvalidArgument
from imgsnap.oci.connections import CONNECT_TIMEOUT_S, ConnectionOptions
from imgsnap.oci.reference import DOCKER_HUB, DOCKER_HUB_WIRE, is_loopback

FILE_NAME = "hosts.toml"
FILE_SIZE_MAX = 1 << 20
HOSTS_MAX = 64
"""Mirrors of one registry; a start that tries more one after the other helps nobody."""
CAPABILITIES = frozenset({"pull", "resolve", "push"})
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Host:
    """One host that serves a registry's repositories. `api` is the path that replaces ``/v2``."""

    host: str
    api: str
    capabilities: frozenset[str]
    options: ConnectionOptions


@dataclass(frozen=True, slots=True)
class RegistryHosts:
    """In the order of their tries; the last is the registry itself, or what stands for it."""

    hosts: tuple[Host, ...]


def find_hosts(directory: Path, registry: str) -> RegistryHosts | None:
    """What a directory says about a registry; None when it says nothing.

    Raises InvalidArgument for a file that cannot be read or makes no sense; names file and key.
    """
    for name in _names(registry):
        path = directory / name / FILE_NAME
        try:
            with path.open("rb") as file:
                raw = file.read(FILE_SIZE_MAX + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InvalidArgument(f"{path}: {error.strerror}") from error
        return parse_hosts(raw, path, registry)
    return None


def parse_hosts(raw: bytes, path: Path, registry: str) -> RegistryHosts:
    """The hosts of a hosts.toml. Keys that we do not know are ignored, as containerd does.

    Raises InvalidArgument; names file and key.
    """
    if len(raw) > FILE_SIZE_MAX:
        raise InvalidArgument(f"{path}: larger than {FILE_SIZE_MAX} bytes")
    import tomllib

    try:
        value = tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError too
        raise InvalidArgument(f"{path}: not TOML: {error}") from error
    root = _Table(value, path, "")
    tables = root.get("host", dict, {})
    if len(tables) > HOSTS_MAX:
        raise root.error("host", f"{len(tables)} hosts, {HOSTS_MAX} at most")
    hosts = [_host(_Table(table, path, f'host."{url}".'), url) for url, table in tables.items()]
    server = root.get("server", str, "") or f"{_scheme(registry)}://{registry}"
    hosts.append(_host(root, server, key="server"))
    return RegistryHosts(tuple(hosts))


def _names(registry: str) -> list[str]:
    host, colon, port = registry.rpartition(":")
    names = [registry, "_default"]
    return [f"{host}_{port}_", *names] if colon and port.isdigit() else names


def _scheme(registry: str) -> str:
    return "http" if is_loopback(registry) else "https"


class _Table:
    """A table of the file, whose errors name file and key."""

    def __init__(self, value: object, path: Path, prefix: str) -> None:
        if not isinstance(value, dict):
            raise InvalidArgument(f"{path}: {prefix.rstrip('.')}: is not a table")
        self._value: Mapping[str, Any] = value
        self._path = path
        self._prefix = prefix

    def error(self, key: str, problem: str) -> InvalidArgument:
        return InvalidArgument(f"{self._path}: {self._prefix}{key}: {problem}")

    def get(self, key: str, kind: type[_T], default: _T) -> _T:
        value = self._value.get(key, default)
        if not isinstance(value, kind):
            raise self.error(key, f"is not a {_KINDS[kind]}")
        return value

    def strings(self, key: str) -> list[str]:
        """One string or an array of them."""
        value = self._value.get(key, [])
        return self._strings(key, [value] if isinstance(value, str) else value)

    def _strings(self, key: str, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "is neither a string nor an array of strings")
        return value

    def file(self, key: str, text: str) -> Path:
        """A path, relative to the file's directory."""
        if not text or "\0" in text:
            raise self.error(key, f"{text!r} is no path")
        return self._path.parent / text

    def pairs(self, key: str) -> list[tuple[Path, Path | None]]:
        """Client certificates with their keys: a path, paths, or pairs of paths."""
        value = self._value.get(key, [])
        found = []
        for item in value if isinstance(value, list) else [value]:
            pair = [item] if isinstance(item, str) else item
            if not isinstance(pair, list) or not 1 <= len(pair) <= 2:
                raise self.error(key, "is neither a path, nor paths, nor pairs of paths")
            certificate, *rest = self._strings(key, pair)
            found.append(
                (self.file(key, certificate), self.file(key, rest[0]) if any(rest) else None)
            )
        return found

    def headers(self) -> list[tuple[str, str]]:
        table = _Table(self._value.get("header", {}), self._path, f"{self._prefix}header.")
        return [(name, text) for name in table._value for text in table.strings(name)]


_KINDS: dict[type, str] = {str: "string", bool: "boolean", dict: "table"}


def _host(table: _Table, url: str, *, key: str = "") -> Host:
    if "://" not in url:
        url = f"{_scheme(url)}://{url}"
    try:
        parts = urlsplit(url)
        hostname, _ = parts.hostname, parts.port
    except ValueError as error:
        raise table.error(key, f"{url[:200]!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not hostname or parts.username is not None:
        raise table.error(key, f"{url[:200]!r} is not an http(s) URL of a host")
    if parts.query or parts.fragment or not url.isprintable() or not url.isascii() or " " in url:
        raise table.error(key, f"{url[:200]!r} has more than a host and a path")
    capabilities = table.strings("capabilities")
    unknown = set(capabilities) - CAPABILITIES
    if unknown:
        raise table.error("capabilities", f"{sorted(unknown)[0][:100]!r} is none")
    host = DOCKER_HUB_WIRE if parts.netloc == DOCKER_HUB else parts.netloc
    return Host(
        host,
        _api(parts.path, override=table.get("override_path", bool, False)),
        frozenset(capabilities) or CAPABILITIES,
        _options(table, plain_http=parts.scheme == "http"),
    )


def _api(path: str, *, override: bool) -> str:
    path = path.rstrip("/")
    return path if override or path.endswith("/v2") else f"{path}/v2"


def _options(table: _Table, *, plain_http: bool) -> ConnectionOptions:
    options = ConnectionOptions(
        plain_http=plain_http,
        insecure=table.get("skip_verify", bool, False),
        more_ca_files=tuple(table.file("ca", name) for name in table.strings("ca")),
        client_pairs=tuple(table.pairs("client")),
        connect_timeout_s=_seconds(table, "dial_timeout", CONNECT_TIMEOUT_S),
        proxy=_proxy(table),
    )
    headers = tuple(table.headers())
    try:
        return replace(options, headers=headers)
    except InvalidArgument as error:
        raise table.error("header", str(error)) from error


def _proxy(table: _Table) -> str:
    """Beside http(s), containerd takes SOCKS proxies; we do not speak SOCKS."""
    url = table.get("proxy", str, "")
    if url and not re.fullmatch(r"https?://[\x21-\x7e]+", url):
        raise table.error("proxy", f"{url[:200]!r} is not an http(s) URL")
    return url


def _seconds(table: _Table, key: str, default: float) -> float:
    """A duration as Go writes it: ``1m30s``, ``500ms``; seconds."""
    text = table.get(key, str, "")
    if not text:
        return default
    if not re.fullmatch(f"(?:{_DURATION.pattern})+", text) or len(text) > 64:
        raise table.error(key, f"{text[:100]!r} is not a duration such as 500ms or 1m30s")
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))
    return max(seconds, 0.001)
