"""What the process of a conversion is told; apart from what converts, which takes memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgsnap.digest import Digest, parse_digest
from imgsnap.errors import InvalidArgument
from imgsnap.node.source import Source


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be converted, and where there is room for it."""

    source: Source  # the image's repository
    manifest: Digest  # of the image, never of an index
    work_dir: Path
    chunk_index: Path

    @property
    def tag(self) -> str:
        """Of the snapshot: the same from every node."""
        return f"{self.manifest.replace(':', '-')}.imgsnap"

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "manifest": self.manifest,
            "work_dir": str(self.work_dir),
            "chunk_index": str(self.chunk_index),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Request":
        """Raises InvalidArgument."""
        try:
            return cls(
                Source.from_json(value["source"]),
                parse_digest(value["manifest"], what="manifest"),
                Path(value["work_dir"]),
                Path(value["chunk_index"]),
            )
        except (KeyError, TypeError) as error:
            raise InvalidArgument(f"not a conversion: {error}") from error
