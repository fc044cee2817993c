"""A fixed set of devices for a FUSE server."""

from collections.abc import Iterable, Mapping
from typing import Any


class Cached:
    """A content that the kernel may cache and read ahead."""

    exact = False

    def __init__(self, content) -> None:
        self.size = content.size
        self.read_into = content.read_into
        self.fetch = content.fetch


class StaticCatalog:
    """Devices by directory name, numbered from 1; what the kernel forgot is in `gone`."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._names = dict(enumerate(files, 1))
        self._files = files
        self.gone: list[int] = []

    def number(self, name: str) -> int | None:
        return next((number for number, known in self._names.items() if known == name), None)

    def content(self, number: int) -> "Cached | None":
        name = self._names.get(number)
        return Cached(self._files[name]) if name is not None else None

    def names(self) -> Iterable[tuple[int, str]]:
        return self._names.items()

    def forgotten(self, number: int) -> None:
        self.gone.append(number)
