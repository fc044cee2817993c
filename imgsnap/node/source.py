"""Where a snapshot comes from, in a form that any of the node's processes can open again."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from imgsnap.errors import InvalidArgument
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import parse_location
from imgsnap.oci.repository import Repository

_VARIABLES = (
    "REGISTRY_AUTH_FILE",
    "DOCKER_CONFIG",
    "XDG_RUNTIME_DIR",
    "XDG_CONFIG_HOME",
    "HOME",
    "SSL_CERT_FILE",
    *("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"),
)
_NOT_KEPT = "retry"
"""A policy with a clock, which no user sets."""


@dataclass(frozen=True, slots=True)
class Source:
    """A reference as the user gave it, with what he said about reaching it. Paths are absolute."""

    location: str  # as parse_location takes it
    store: Path
    options: RegistryOptions = field(default_factory=RegistryOptions)
    environ: tuple[tuple[str, str], ...] = ()  # see `kept_environ`

    @staticmethod
    def kept_environ(environ: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """The caller's variables that say where credentials, certificates and proxies are."""
        return tuple((name, environ[name]) for name in _VARIABLES if name in environ)

    def open(self, environ: Mapping[str, str]) -> Repository:
        """The repository; the caller closes it. Raises what `open_repository` raises."""
        repository, _ = open_repository(
            parse_location(self.location),
            self.options,
            store=self.store,
            environ={**environ, **dict(self.environ)},
        )
        return repository

    def to_json(self) -> dict[str, Any]:
        options = {
            item.name: _plain(getattr(self.options, item.name))
            for item in fields(self.options)
            if item.name != _NOT_KEPT
        }
        return {
            "location": self.location,
            "store": str(self.store),
            "options": options,
            "environ": [list(pair) for pair in self.environ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Source":
        """Raises InvalidArgument."""
        try:
            known = {item.name: item for item in fields(RegistryOptions)}
            options = {name: _typed(known[name], plain) for name, plain in value["options"].items()}
            environ = tuple((str(name), str(text)) for name, text in value["environ"])
            return cls(value["location"], Path(value["store"]), RegistryOptions(**options), environ)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidArgument(f"not a snapshot's source: {error}") from error


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _typed(item: "dataclasses.Field[Any]", value: Any) -> Any:
    if value is not None and (item.type is Path or Path in get_args(item.type)):
        return Path(value)
    if isinstance(value, list):
        return tuple(tuple(part) if isinstance(part, list) else part for part in value)
    return value
