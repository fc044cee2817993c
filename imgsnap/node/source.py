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

_NOT_KEPT = "retry"
"""A policy with a clock, which no user sets."""


@dataclass(frozen=True, slots=True)
class Source:
    """A reference as the user gave it, with what he said about reaching it. Paths are absolute."""

    location: str  # as parse_location takes it
    store: Path
    options: RegistryOptions = field(default_factory=RegistryOptions)

    def open(self, environ: Mapping[str, str]) -> Repository:
        """The repository; the caller closes it. Raises what `open_repository` raises."""
        repository, _ = open_repository(
            parse_location(self.location), self.options, store=self.store, environ=environ
        )
        return repository

    def to_json(self) -> dict[str, Any]:
        options = {
            item.name: _plain(getattr(self.options, item.name))
            for item in fields(self.options)
            if item.name != _NOT_KEPT
        }
        return {"location": self.location, "store": str(self.store), "options": options}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Source":
        """Raises InvalidArgument."""
        try:
            known = {item.name: item for item in fields(RegistryOptions)}
            options = {name: _typed(known[name], plain) for name, plain in value["options"].items()}
            return cls(value["location"], Path(value["store"]), RegistryOptions(**options))
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
