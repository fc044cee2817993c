"""What containerd's configuration has to say about our snapshotter, for each of its series.

Sources: containerd's docs/cri/config.md and docs/remote-snapshotter.md; what 1.6.20, 1.7.24 and
2.1.9 do with it was tried. 1.x reads the tables of `io.containerd.grpc.v1.cri`; 2.x those of
`io.containerd.cri.v1.images`, and pulls through the transfer service, which unpacks only for the
snapshotters that its `unpack_config` names.
"""

import json
import re
import subprocess
from pathlib import Path

from imgsnap.errors import InvalidArgument, NotFound, Unavailable

PLUGIN = "imgsnap"
"""Our name among containerd's snapshotters."""
CONFIG_FILE = Path("/etc/containerd/config.toml")
SOCKET = Path("/run/containerd/containerd.sock")
CRI_1 = "io.containerd.grpc.v1.cri"
CRI_2 = "io.containerd.cri.v1.images"
TRANSFER = "io.containerd.transfer.v1.local"
ANNOTATIONS_EXPORT = "enable_remote_snapshot_annotations"
_TIMEOUT_S = 5.0

Version = tuple[int, int]
"""Major and minor."""


def parse_version(text: str) -> Version:
    """``1.7``, ``v2.1.9``, ``1.6.20~ds1`` or ``2.x``. Raises InvalidArgument."""
    match = re.match(r"v?(\d{1,4})\.(\d{1,4}|x)", text)
    if match is None:
        raise InvalidArgument(f"{text!r} is no version of containerd", hint="1.6, 1.7 or 2.x")
    version = int(match[1]), 0 if match[2] == "x" else int(match[2])
    if version < (1, 6):
        raise InvalidArgument(f"containerd {text} is too old", hint="1.6 and newer are supported")
    return version


def installed_version(socket: Path = SOCKET) -> tuple[Version, str]:
    """Of the containerd that answers on a socket, else of the program on the path; and whose it is.

    Raises NotFound when there is neither.
    """
    from imgsnap.containerd.version import server_version

    try:
        text = server_version(socket, timeout=_TIMEOUT_S)
        return parse_version(text), f"containerd {text}, which answers on {socket}"
    except Unavailable:
        pass
    try:
        command = ["containerd", "--version"]
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
        text = done.stdout.decode(errors="replace").split()[2]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise NotFound(
            f"nothing answers on {socket}, and there is no containerd to ask for its version",
            hint="say which: --version 1.6, 1.7 or 2.x",
        ) from None
    return parse_version(text), f"containerd {text}, the program on the path"


def snippet(version: Version, address: Path, root: Path, platform: str) -> str:
    """The TOML that makes containerd use the snapshotter on the socket `address`; `root` is its
    directory of state, for containerd's account of the disk. Raises InvalidArgument for a relative
    path: containerd would take it as one in its own working directory.
    """
    for name, path in (("address", address), ("root", root)):
        if not path.is_absolute() or not str(path).isprintable():
            raise InvalidArgument(f"{name}: {str(path)!r} is not an absolute path")
    plugin = [f"[proxy_plugins.{PLUGIN}]", '  type = "snapshot"', f"  address = {_text(address)}"]
    if version < (2, 0):
        lines = ["version = 2", "", *plugin, "", *_cri_1()]
    else:
        lines = ["version = 3", "", *plugin, *_exports(root), "", *_unpack(platform), *_cri_2()]
    return "\n".join(lines) + "\n"


def _cri_1() -> list[str]:
    return [
        f'[plugins."{CRI_1}".containerd]',
        f'  snapshotter = "{PLUGIN}"',
        "  disable_snapshot_annotations = false",
    ]


def _cri_2() -> list[str]:
    return [f'[plugins."{CRI_2}"]', f'  snapshotter = "{PLUGIN}"']


def _exports(root: Path) -> list[str]:
    return [
        f"  [proxy_plugins.{PLUGIN}.exports]",
        f"    root = {_text(root)}",
        f'    {ANNOTATIONS_EXPORT} = "true"',
    ]


def _unpack(platform: str) -> list[str]:
    """Naming one snapshotter drops the default's, so overlayfs is named again."""
    lines = []
    for name in (PLUGIN, "overlayfs"):
        lines += [
            f'[[plugins."{TRANSFER}".unpack_config]]',
            f"  platform = {_text(platform)}",
            f'  snapshotter = "{name}"',
            "",
        ]
    return lines


def _text(value: object) -> str:
    """A TOML string: JSON's form is one, for printable text."""
    return json.dumps(str(value), ensure_ascii=False)
