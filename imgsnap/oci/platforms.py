"""Platforms: this machine's, the text form, and which image serves whom."""

import os

from imgsnap.errors import InvalidArgument
from imgsnap.oci.repository import Platform

_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "loongarch64": "loong64",
}
"""uname's words for GOARCH's."""

_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7"}
"""image-spec, image-index.md, "Platform Variants"."""


def host_platform() -> Platform:
    """linux on this machine's architecture."""
    machine = os.uname().machine
    return Platform("linux", _ARCHITECTURES.get(machine, machine))


def parse_platform(text: str) -> Platform:
    """``os/architecture[/variant]``. Raises InvalidArgument."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise InvalidArgument(
            f"platform {text!r} is not OS/ARCHITECTURE[/VARIANT]", hint="for example linux/arm64"
        )
    return Platform(parts[0], _ARCHITECTURES.get(parts[1], parts[1]), "".join(parts[2:]))


def matches(offered: Platform, wanted: Platform) -> bool:
    """Whether an image for `offered` is what somebody who asks for `wanted` means."""
    if (wanted.os, wanted.architecture) != (offered.os, offered.architecture):
        return False
    return not wanted.variant or wanted.variant == (
        offered.variant or _DEFAULT_VARIANT.get(offered.architecture, "")
    )
