"""Named bounds on what a source image may ask of the converter; all can be raised by the user."""

from dataclasses import dataclass, fields, replace

from imgsnap.errors import InvalidArgument, LimitExceeded
from imgsnap.units import GIB, MIB, parse_size


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes; the defaults hold any image seen in the wild with room to spare."""

    layers: int = 500  # overlayfs itself stops at 500 lower directories
    entries: int = 1_000_000  # tar entries in one layer
    layer_size: int = 64 * GIB  # one layer, decompressed
    layer_ratio: int = 200  # decompressed / compressed, asked once a layer is over 1 GiB
    file_size: int = 64 * GIB  # one file, holes included
    header_size: int = MIB  # one PAX or GNU long-name record
    xattr_size: int = 64 << 10  # all xattrs of one entry: the kernel's XATTR_LIST_MAX

    def check(self, name: str, value: int, *, where: str) -> None:
        """Raises LimitExceeded when `value` is over the limit `name`."""
        maximum: int = getattr(self, name)
        if value > maximum:
            raise LimitExceeded(name.replace("_", "-"), value, maximum, where=where)

    @staticmethod
    def names() -> list[str]:
        return [field.name.replace("_", "-") for field in fields(Limits)]

    def with_text(self, text: str) -> "Limits":
        """A copy with one limit set from ``name=value``; values may have units.

        Raises InvalidArgument for an unknown name or a value that is no size.
        """
        name, equals, value = text.partition("=")
        if not equals or name not in self.names():
            raise InvalidArgument(
                f"unknown limit {text!r}", hint=f"NAME=VALUE with one of: {', '.join(self.names())}"
            )
        try:
            number = parse_size(value)
        except ValueError as error:
            raise InvalidArgument(f"limit {name}: {error}") from error
        return replace(self, **{name.replace("-", "_"): number})


PATH_MAX = 4096
NAME_MAX = 255
"""The kernel's limits (linux/limits.h): longer names could not be opened."""
