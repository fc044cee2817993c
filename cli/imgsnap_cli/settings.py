"""Where things are on this machine, from flags and `IMGSNAP_*` variables."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_STATE = Path("/var/lib/imgsnap")
SYSTEM_RUN = Path("/run/imgsnap")
CONTAINERD = Path("/run/containerd/containerd.sock")
CONTAINERD_HOSTS = Path("/etc/containerd/certs.d")


@dataclass(frozen=True, slots=True)
class Settings:
    """Directories, and the environment as the library may see it."""

    store: Path
    cache: Path
    run: Path
    hosts: Path  # hosts.toml files: mirrors of registries
    cache_quota: str | None  # as it was given; None: the one kept with the cache
    policy: Path | None  # whose signatures snapshots need; None: nobody's
    metrics: str | None  # where the daemon serves metrics: [ADDRESS:]PORT
    trust: tuple[str, ...]  # patterns of repositories whose snapshots of images are used
    convert: tuple[str, ...]  # and of those whose images are converted on first use
    snapshotter_metrics: str | None  # where the snapshotter serves metrics: [ADDRESS:]PORT
    environ: Mapping[str, str]

    @property
    def snapshotter(self) -> Path:
        """The snapshotter's socket, to which containerd connects."""
        return self.run / "snapshotter.sock"

    @property
    def containerd(self) -> Path:
        """containerd's socket; the variable is that of `ctr`."""
        return Path(self.environ.get("CONTAINERD_ADDRESS") or CONTAINERD).absolute()

    @classmethod
    def make(
        cls,
        environ: Mapping[str, str],
        *,
        store: str | None = None,
        cache: str | None = None,
        run: str | None = None,
        cache_quota: str | None = None,
    ) -> "Settings":
        """Flag over variable over default; the defaults of other users than root are XDG's."""
        state, caches, runtime = _bases(environ)
        return cls(
            store=Path(store or environ.get("IMGSNAP_STORE") or state / "store").absolute(),
            cache=Path(cache or environ.get("IMGSNAP_CACHE_DIR") or caches).absolute(),
            run=Path(run or environ.get("IMGSNAP_RUN_DIR") or runtime).absolute(),
            hosts=Path(environ.get("IMGSNAP_HOSTS_DIR") or CONTAINERD_HOSTS).absolute(),
            cache_quota=cache_quota or environ.get("IMGSNAP_CACHE_QUOTA") or None,
            policy=_path(environ.get("IMGSNAP_POLICY")),
            metrics=environ.get("IMGSNAP_METRICS") or None,
            trust=tuple(environ.get("IMGSNAP_TRUST", "").split()),
            convert=tuple(environ.get("IMGSNAP_CONVERT", "").split()),
            snapshotter_metrics=environ.get("IMGSNAP_SNAPSHOTTER_METRICS") or None,
            environ=dict(environ),
        )


def _path(text: str | None) -> Path | None:
    return Path(text).absolute() if text else None


def _bases(environ: Mapping[str, str]) -> tuple[Path, Path, Path]:
    if os.geteuid() == 0:
        return SYSTEM_STATE, SYSTEM_STATE / "cache", SYSTEM_RUN
    home = Path(environ.get("HOME", "/nonexistent"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    cache = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    run = Path(environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    return data / "imgsnap", cache / "imgsnap", run / "imgsnap"
