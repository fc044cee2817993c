"""What `imgsnap attach` attached, found by what users call it."""

from pathlib import Path
from typing import Any

from imgsnap.errors import InvalidArgument, NotFound
from imgsnap_cli.settings import Settings

ID_PREFIX_MIN = 6


def attached(settings: Settings) -> list[dict[str, Any]]:
    """The attachments for VMMs; none without a daemon."""
    from imgsnap.node.client import daemon_call

    try:
        found = daemon_call(settings.run, "attachments")
    except NotFound:
        return []
    return [item for item in found if item["attached"]]


def find_attached(settings: Settings, name: str) -> dict[str, Any]:
    """By id, the beginning of one, or path. Raises NotFound, InvalidArgument."""
    digits = name.removeprefix("sha256:")
    found = [
        item
        for item in attached(settings)
        if item["path"] == str(Path(name).absolute())
        or (len(digits) >= ID_PREFIX_MIN and item["id"].startswith(digits))
    ]
    if len(found) > 1:
        raise InvalidArgument(f"{name} begins {len(found)} ids", hint="give more of it")
    if not found:
        raise NotFound(f"{name} is not attached", hint="list what is: imgsnap attachments")
    return found[0]


def as_json(item: dict[str, Any]) -> dict[str, Any]:
    """One attachment as commands print it."""
    return {
        "id": item["id"],
        "path": item["path"],
        "size": item["device_size"],
        "repository": item["repository"],
        "digest": item["manifest_digest"],
    }
