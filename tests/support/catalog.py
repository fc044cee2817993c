"""A fixed set of devices for a FUSE server."""

from collections.abc import Iterable, Mapping

from imgsnap.fuse.files import FileContent


class StaticCatalog:
    """Devices by directory name, numbered from 1; what the kernel forgot is in `gone`."""

    def __init__(self, files: Mapping[str, FileContent]) -> None:
        self._names = dict(enumerate(files, 1))
        self._files = files
        self.gone: list[int] = []

    def number(self, name: str) -> int | None:
        return next((number for number, known in self._names.items() if known == name), None)

    def content(self, number: int) -> FileContent | None:
        name = self._names.get(number)
        return self._files[name] if name is not None else None

    def names(self) -> Iterable[tuple[int, str]]:
        return self._names.items()

    def forgotten(self, number: int) -> None:
        self.gone.append(number)
