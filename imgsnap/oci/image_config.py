"""The part of an OCI image config that says how to run the image (image-spec, config.md)."""

from dataclasses import dataclass
from typing import Any

from imgsnap.errors import FormatError
from imgsnap.oci.manifest import parse_json_object

RECORD = "image config"
ITEMS_MAX = 4096
TEXT_MAX = 128 << 10
"""The kernel's MAX_ARG_STRLEN: a longer argument or variable could not be passed on."""


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What the image's author wants run; empty fields were not set."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # NAME=VALUE
    working_dir: str = "/"
    user: str = ""  # "", "name", "uid", and either with ":group"


def parse_run_config(raw: bytes) -> RunConfig:
    """Raises FormatError for fields of the wrong type."""
    value = parse_json_object(raw, record=RECORD).get("config") or {}
    if not isinstance(value, dict):
        raise FormatError(RECORD, "config", 0, "is not an object")
    directory = _text(value, "WorkingDir") or "/"
    return RunConfig(
        entrypoint=_texts(value, "Entrypoint"),
        cmd=_texts(value, "Cmd"),
        env=tuple(item for item in _texts(value, "Env") if "=" in item[1:]),
        working_dir=directory if directory.startswith("/") else f"/{directory}",
        user=_text(value, "User"),
    )


def _text(value: dict[str, Any], key: str) -> str:
    text = value.get(key)
    if text is None:
        return ""
    if not isinstance(text, str) or len(text) > TEXT_MAX or "\0" in text:
        raise FormatError(RECORD, f"config.{key}", 0, "is not a string that can be passed on")
    return text


def _texts(value: dict[str, Any], key: str) -> tuple[str, ...]:
    items = value.get(key)
    if items is None:
        return ()
    if not isinstance(items, list) or len(items) > ITEMS_MAX:
        raise FormatError(RECORD, f"config.{key}", 0, f"is not a list of at most {ITEMS_MAX}")
    for item in items:
        if not isinstance(item, str) or len(item) > TEXT_MAX or "\0" in item:
            raise FormatError(RECORD, f"config.{key}", 0, "holds no string that can be passed on")
    return tuple(items)
