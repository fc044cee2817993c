"""What one process asks another to attach."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from imgsnap.blockstore.read_options import ReadOptions, read_options
from imgsnap.errors import InvalidArgument
from imgsnap.node.source import Source
from imgsnap.oci.platforms import parse_platform
from imgsnap.oci.repository import Platform


@dataclass(frozen=True, slots=True)
class AttachRequest:
    """A snapshot, where it comes from and how it is read."""

    source: Source
    reference: str  # a tag or digest in the repository
    platform: Platform | None = None  # None: this machine's, or whatever the snapshot is for
    read: ReadOptions = field(default_factory=ReadOptions)
    policies: tuple[str, ...] = ()  # whose signatures it needs: see node.policies

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source.to_json(),
            "reference": self.reference,
            "platform": str(self.platform) if self.platform else None,
            "options": asdict(self.read),
            "policies": list(self.policies),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "AttachRequest":
        """What `to_json` made; other keys are others' business. Raises InvalidArgument."""
        source, platform = Source.from_json(value.get("source", {})), value.get("platform")
        try:
            return cls(
                source,
                str(value["reference"]),
                parse_platform(platform) if platform else None,
                read_options(value.get("options", {})),
                tuple(str(policy) for policy in value.get("policies", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"not a request to attach: {error}") from error
