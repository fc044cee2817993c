"""containerd's configuration as containerd sees it: a file and those that it imports.

Sources: containerd's cmd/containerd/server/config/config.go of 1.6, 1.7 and 2.1, and their `config
dump`. An import is a path or a pattern, relative to the file that names it; but a pattern in 1.6 is
relative to containerd's working directory, which service managers set to the root. Of
`proxy_plugins` a later file replaces whole entries; of `plugins`, 1.x replaces whole entries too:
an import with one key of a plugin drops every other. 2.x merges tables and replaces arrays.
"""

import os
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgsnap.containerd.config import Version
from imgsnap.errors import InvalidArgument

FILE_BYTES_MAX = 1 << 20
FILES_MAX = 64


@dataclass(frozen=True, slots=True)
class ContainerdConfig:
    """The merged tables; `version` is that of the format (2, 3), as the first file says it."""

    version: int
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    proxy_plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    disabled_plugins: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def plugin(self, name: str, *tables: str) -> Mapping[str, Any]:
        """A plugin's table, or one below it; empty when it is not there."""
        table: Any = self.plugins.get(name, {})
        for key in tables:
            table = table.get(key, {}) if isinstance(table, dict) else {}
        return table if isinstance(table, dict) else {}


def read_config(path: Path, containerd: Version | None = None) -> ContainerdConfig:
    """A configuration file with its imports, as this version of containerd reads it; without one,
    as the version that writes such files.

    Raises InvalidArgument, which names the file that cannot be read or makes no sense.
    """
    documents = _load(path, containerd)
    first = documents[0][1]
    version = first.get("version", 1)
    if not isinstance(version, int):
        raise InvalidArgument(f"{path}: version: is not a number")
    deep = containerd >= (2, 0) if containerd is not None else version >= 3
    plugins: dict[str, Any] = {}
    proxies: dict[str, Any] = {}
    disabled: list[object] = []
    for file, document in documents:
        found = _table(document, "plugins", file)
        plugins = _merged(plugins, found) if deep else {**plugins, **found}
        proxies.update(_table(document, "proxy_plugins", file))
        names = document.get("disabled_plugins", [])
        disabled += names if isinstance(names, list) else []
    return ContainerdConfig(
        version,
        {name: table for name, table in plugins.items() if isinstance(table, dict)},
        {name: table for name, table in proxies.items() if isinstance(table, dict)},
        tuple(map(str, disabled)),
        tuple(file for file, _ in documents),
    )


def _load(path: Path, containerd: Version | None) -> list[tuple[Path, dict[str, Any]]]:
    """The files in the order in which containerd reads them: each before what it imports."""
    found: dict[Path, dict[str, Any]] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop(0)
        if file in found:
            continue
        if len(found) == FILES_MAX:
            raise InvalidArgument(f"{path}: imports more than {FILES_MAX} files")
        found[file] = _parse(file)
        patterns = Path("/") if containerd == (1, 6) else file.parent
        for name in _imports(file, found[file]):
            waiting += _matches(patterns, name) if "*" in name else [_normal(file.parent / name)]
    return list(found.items())


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    if len(raw) > FILE_BYTES_MAX:
        raise InvalidArgument(f"{path}: larger than {FILE_BYTES_MAX} bytes")
    try:
        return tomllib.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: not TOML: {error}") from error


def _imports(path: Path, document: Mapping[str, Any]) -> list[str]:
    named = document.get("imports", [])
    if not isinstance(named, list) or not all(isinstance(item, str) for item in named):
        raise InvalidArgument(f"{path}: imports: is not an array of strings")
    return named


def _matches(directory: Path, pattern: str) -> list[Path]:
    """The files of a pattern; none when it makes no sense, as for containerd."""
    absolute = directory / pattern
    with suppress(ValueError, NotImplementedError, OSError):
        relative = absolute.relative_to(absolute.anchor)
        return sorted(map(_normal, Path(absolute.anchor).glob(str(relative))))
    return []


def _normal(path: Path) -> Path:
    """Without ``..``, so that one file has one name."""
    return Path(os.path.normpath(path))


def _table(document: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    value = document.get(name, {})
    if not isinstance(value, dict):
        raise InvalidArgument(f"{file}: {name}: is not a table")
    return value


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result
