"""Checks of containerd's configuration: does it know our snapshotter, and use it?

All findings are warnings at worst: mounting by `imgsnap mount` and `run` needs no containerd.
"""

import stat
from collections.abc import Iterator
from pathlib import Path

from imgsnap.containerd import config
from imgsnap.containerd.config_files import ContainerdConfig, read_config
from imgsnap.errors import InvalidArgument
from imgsnap.mount.doctor import Check, Host, Status

_SHOW = "`imgsnap config containerd` prints what belongs there"
_OTHER_MAJOR = {2: config.CRI_2, 3: config.CRI_1}
"""By the format's version, the CRI plugin's name that belongs to the other one."""


def examine_containerd(
    address: Path,
    *,
    file: Path = config.CONFIG_FILE,
    containerd: config.Version | None = None,
    host: Host | None = None,
) -> Iterator[Check]:
    """What stands between containerd and the snapshotter that listens on `address`.

    `containerd` is the running version, when it is known: it decides how imports merge and which
    settings matter. `file` is where its configuration is.
    """
    host = host or Host()
    path = host.path(str(file))
    if not path.exists():
        problem = f"{file} does not exist: containerd knows no snapshotter of ours"
        yield _warn("configuration", problem, f"write one; {_SHOW}")
        return
    try:
        found = read_config(path, containerd)
    except InvalidArgument as error:
        yield _warn("configuration", str(error), "containerd does not start with it; correct it")
        return
    names = "file" if len(found.files) == 1 else "files"
    yield _ok("configuration", f"{file}: version {found.version}, {len(found.files)} {names}")
    series = containerd or ((2, 0) if found.version >= 3 else (1, 7))
    yield from _registration(found, address, host)
    if config.PLUGIN in found.proxy_plugins:
        yield from _use(found, series)


def _registration(found: ContainerdConfig, address: Path, host: Host) -> Iterator[Check]:
    title = "proxy plugin"
    if found.version < 2:
        yield _warn(title, "version 1 of the format", "`containerd config migrate` makes a new one")
        return
    plugin = found.proxy_plugins.get(config.PLUGIN)
    if plugin is None:
        yield _warn(title, f"no [proxy_plugins.{config.PLUGIN}]: not registered", _SHOW)
        return
    if plugin.get("type") != "snapshot":
        yield _warn(title, f"its type is {plugin.get('type')!r}", 'type = "snapshot"')
        return
    given = plugin.get("address")
    if not isinstance(given, str) or not Path(given).is_absolute():
        yield _warn(title, f"its address is {given!r}", f'address = "{address}"')
    elif Path(given) != address:
        detail = f"its address is {given}, and the snapshotter listens on {address}"
        yield _warn(title, detail, "correct one, or give --run-dir as the snapshotter has it")
    elif not _is_socket(host.path(given)):
        yield _warn(title, f"{given} is not there", "systemctl start imgsnap-snapshotter")
    else:
        yield _ok(title, given)


def _use(found: ContainerdConfig, series: config.Version) -> Iterator[Check]:
    exports = found.proxy_plugins[config.PLUGIN].get("exports", {})
    exports = exports if isinstance(exports, dict) else {}
    root = exports.get("root")
    if root is not None and not (isinstance(root, str) and Path(root).is_absolute()):
        yield _warn("snapshotter's root", f"exports.root is {root!r}", "name an absolute path")
    if series >= (2, 0):
        yield _annotations_2(exports)
        yield _unpacking(found)
    name = config.CRI_2 if found.version >= 3 else config.CRI_1
    if config.CRI_1 in found.disabled_plugins or "cri" in found.disabled_plugins:
        yield _warn("CRI", "disabled_plugins names it: no pods here", "leave it out for Kubernetes")
        return
    table = found.plugin(name) if found.version >= 3 else found.plugin(name, "containerd")
    yield _cri_snapshotter(found, table)
    if table.get("snapshotter") == config.PLUGIN:
        yield from _cri_annotations(table, series)


def _annotations_2(exports: dict[str, object]) -> Check:
    title, key = "image annotations", config.ANNOTATIONS_EXPORT
    if exports.get(key) == "true":
        return _ok(title, f"{key} is set")
    return _warn(
        title, f'exports.{key} is not "true": images\' names do not reach the snapshotter', _SHOW
    )


def _unpacking(found: ContainerdConfig) -> Check:
    """Without an entry the transfer service pulls and does not unpack."""
    title, entries = "unpack_config", found.plugin(config.TRANSFER).get("unpack_config")
    entries = entries if isinstance(entries, list) else []
    named = [entry.get("snapshotter") for entry in entries if isinstance(entry, dict)]
    if config.PLUGIN in named:
        return _ok(title, ", ".join(map(str, named)))
    return _warn(title, f'of {config.TRANSFER}: none has snapshotter = "{config.PLUGIN}"', _SHOW)


def _cri_snapshotter(found: ContainerdConfig, table: object) -> Check:
    title = "CRI's snapshotter"
    chosen = table.get("snapshotter") if isinstance(table, dict) else None
    if chosen == config.PLUGIN:
        return _ok(title, config.PLUGIN)
    other = _OTHER_MAJOR.get(found.version, "")
    if other and found.plugin(other):
        detail = f"not set; there are tables of {other}, which a version {found.version} file lacks"
        return _warn(title, detail, f"use one format in all files; {_SHOW}")
    detail = f"{chosen or 'not set, so overlayfs'}: pods do not start from snapshots"
    return _warn(title, detail, _SHOW)


def _cri_annotations(table: object, series: config.Version) -> Iterator[Check]:
    """1.x sends no labels unless told to; 2.x, when told to, leaves the transfer service."""
    title, key = "CRI's labels", "disable_snapshot_annotations"
    value = table.get(key, True) if isinstance(table, dict) else True
    if series >= (2, 0):
        if value is False:
            detail = f"{key} = false makes containerd 2 pull in its old way"
            yield _warn(
                title, detail, "leave it out: enable_remote_snapshot_annotations replaces it"
            )
    elif value is False:
        yield _ok(title, f"{key} = false")
    else:
        detail = f"{key} is not false: CRI does not say which image it pulls"
        yield _warn(title, detail, f"{key} = false")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def _ok(title: str, detail: str) -> Check:
    return Check(f"containerd: {title}", Status.OK, detail)


def _warn(title: str, detail: str, hint: str) -> Check:
    return Check(f"containerd: {title}", Status.WARN, detail, hint)
