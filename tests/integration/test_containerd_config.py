"""`imgsnap config containerd` and the doctor, against what real containerds make of it."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from imgsnap.containerd.config import parse_version
from imgsnap.containerd.config_files import read_config
from imgsnap.mount.doctor import Status
from imgsnap.snapshotter.doctor import examine_containerd
from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, Release, release, running_containerd

pytestmark = [pytest.mark.root]


def dumped(found: Release, file: Path) -> dict:
    """The final configuration, as containerd says it."""
    command = [found.program("containerd"), "--config", str(file), "config", "dump"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd="/")
    return tomllib.loads(done.stdout)


@pytest.mark.parametrize("series", VERSIONS)
def test_containerd_runs_with_the_snippet(cli: Cli, series: str, tmp_path: Path):
    found = release(series)
    asked = "2.x" if found.major >= 2 else series
    toml = cli("config", "containerd", "--version", asked).out
    file = tmp_path / "config.toml"
    file.write_text(toml)
    config = dumped(found, file)
    address = str(cli.run_dir / "snapshotter.sock")
    assert config["proxy_plugins"]["imgsnap"]["address"] == address
    if found.major < 2:
        cri = config["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]
        assert cri["snapshotter"] == "imgsnap" and cri["disable_snapshot_annotations"] is False
    else:
        assert config["plugins"]["io.containerd.cri.v1.images"]["snapshotter"] == "imgsnap"
        entries = config["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
        assert [entry["snapshotter"] for entry in entries] == ["imgsnap", "overlayfs"]
        assert config["version"] == 3
    body = toml.partition("version = ")[2].partition("\n")[2]
    with running_containerd(found, cri=True, extra=body) as containerd:
        plugins = containerd.ctr("plugins", "ls")
        [line] = [line for line in plugins.splitlines() if " imgsnap " in line]
        assert line.split()[0] == "io.containerd.snapshotter.v1" and line.split()[-1] == "ok"
        [line] = [
            line
            for line in plugins.splitlines()
            if "io.containerd.grpc.v1 " in line and " cri " in line
        ]
        assert line.split()[-1] == "ok"
        shown = cli("config", "containerd", "--containerd", containerd.socket).out
        assert shown.partition("\n")[2] == toml.partition("\n")[2]
        assert "which answers on" in shown and series in shown.splitlines()[0]


MAIN = """
version = {version}
imports = ["{pattern}", "more.toml"]
disabled_plugins = ["io.containerd.snapshotter.v1.zfs"]
[plugins."{cri}".registry]
  config_path = "/main"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "overlayfs"
[proxy_plugins.imgsnap]
  type = "snapshot"
  address = "/old"
[proxy_plugins.other]
  type = "snapshot"
  address = "/other"
"""
IMPORTED = """
version = {version}
imports = ["../deep.toml"]
[plugins."{cri}"{below}]
  snapshotter = "imgsnap"
[proxy_plugins.imgsnap]
  type = "snapshot"
  address = "/new"
"""
DEEP = """
version = {version}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = "imgsnap"
"""
MORE = """
version = {version}
[plugins."{cri}"]
  max_concurrent_downloads = 5
"""


@pytest.mark.parametrize("pattern", ["conf.d/*.toml", "{tmp_path}/conf.d/*.toml"])
@pytest.mark.parametrize("series", VERSIONS)
def test_imports_merge_as_containerd_merges_them(series: str, pattern: str, tmp_path: Path):
    found = release(series)
    cri = "io.containerd.cri.v1.images" if found.major >= 2 else "io.containerd.grpc.v1.cri"
    names = {
        "version": 3 if found.major >= 2 else 2,
        "cri": cri,
        "pattern": pattern.format(tmp_path=tmp_path),
        "below": "" if found.major >= 2 else ".containerd",
    }
    (tmp_path / "conf.d").mkdir()
    texts = {"c": MAIN, "conf.d/a": IMPORTED, "deep": DEEP, "more": MORE}
    for name, text in texts.items():
        (tmp_path / f"{name}.toml").write_text(text.format(**names))
    file = tmp_path / "c.toml"
    truth, ours = dumped(found, file), read_config(file, parse_version(series))
    is_lost = series == "1.6" and pattern.startswith("conf.d")  # there it is relative to /
    assert len(ours.files) == (2 if is_lost else 4)
    for name, table in truth["proxy_plugins"].items():
        assert ours.proxy_plugins[name]["address"] == table["address"]
    theirs = truth["plugins"][cri]
    images = theirs if found.major >= 2 else theirs["containerd"]
    table = ours.plugin(cri) if found.major >= 2 else ours.plugin(cri, "containerd")
    assert table.get("snapshotter", "overlayfs") == images["snapshotter"]
    assert ours.plugin(cri, "registry").get("config_path", "") == theirs["registry"]["config_path"]
    assert ours.plugin(cri)["max_concurrent_downloads"] == theirs["max_concurrent_downloads"] == 5
    if series != "1.6":  # which has no such plugin
        theirs = truth["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
        mine = ours.plugin("io.containerd.transfer.v1.local")["unpack_config"]
        assert [e["snapshotter"] for e in mine] == [e["snapshotter"] for e in theirs]


@pytest.mark.parametrize("series", VERSIONS)
def test_the_doctor_finds_nothing_wrong_with_the_snippet(cli: Cli, series: str, tmp_path: Path):
    import socket

    version = "2.x" if series.startswith("2") else series
    file = tmp_path / "config.toml"
    file.write_text(cli("config", "containerd", "--version", version).out)
    address = cli.run_dir / "snapshotter.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        checks = list(examine_containerd(address, file=file))
    assert all(check.status is Status.OK for check in checks), checks
    out = cli.any("doctor", "--containerd-config", file).out
    assert "containerd: proxy plugin: " in out and "systemctl start imgsnap-snapshotter" not in out
    address.unlink()
    assert (
        "systemctl start imgsnap-snapshotter" in cli.any("doctor", "--containerd-config", file).out
    )
