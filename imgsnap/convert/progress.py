"""What a conversion tells whoever watches it."""

from typing import Protocol


class Progress(Protocol):
    """Called from several threads; a layer is named by its label."""

    def stage(self, layer: str, stage: str, total: int) -> None:
        """The layer enters a stage (``fetch``, ``pack``, ``upload``) of `total` bytes."""

    def advance(self, layer: str, count: int) -> None:
        """`count` more bytes of the stage are done."""

    def done(self, layer: str, note: str) -> None:
        """The layer is complete; `note` says how (``reused``, ``12 MiB new``)."""


class Silent:
    """Nobody watches."""

    def stage(self, layer: str, stage: str, total: int) -> None: ...

    def advance(self, layer: str, count: int) -> None: ...

    def done(self, layer: str, note: str) -> None: ...
