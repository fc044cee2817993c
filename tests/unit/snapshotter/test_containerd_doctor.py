"""The doctor, shown configurations of containerd: each mistake is named, with what to do."""

import socket
from pathlib import Path

import pytest

from imgsnap.containerd.config import parse_version, snippet
from imgsnap.containerd.config_files import FILES_MAX, read_config
from imgsnap.errors import InvalidArgument
from imgsnap.mount.doctor import Check, Status
from imgsnap.snapshotter.doctor import examine_containerd

ROOT = Path("/var/lib/imgsnap/snapshotter")


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "s"
    monkeypatch.chdir(tmp_path)  # a test's directory may be too long for a socket's name
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s")
        yield path


def findings(tmp_path: Path, address: Path, text: str, **options) -> dict[str, Check]:
    file = tmp_path / "config.toml"
    file.write_text(text)
    checks = {
        check.name.removeprefix("containerd: "): check
        for check in examine_containerd(address, file=file, **options)
    }
    assert all(check.hint for check in checks.values() if check.status is not Status.OK)
    return checks


def good(address: Path, version: str) -> str:
    return snippet(parse_version(version), address, ROOT, "linux/amd64")


@pytest.mark.parametrize("version", ["1.6", "1.7", "2.x", "2.1.9"])
def test_our_own_snippet_is_good(tmp_path, address, version):
    checks = findings(tmp_path, address, good(address, version))
    assert all(check.status is Status.OK for check in checks.values()), checks


MISTAKES = [
    ("1.7", "[proxy_plugins.imgsnap]", "[proxy_plugins.other]", "proxy plugin", "not registered"),
    ("1.7", '"snapshot"', '"content"', "proxy plugin", "'content'"),
    ("1.7", "address = \"/", 'address = "', "proxy plugin", "its address is"),
    ("2.x", "address = \"/", 'address = "/elsewhere/', "proxy plugin", "listens on"),
    ("1.7", "address", "adress", "proxy plugin", "None"),
    ("1.7", "annotations = false", "annotations = true", "CRI's labels", "not false"),
    ("1.7", "  disable_snapshot_annotations = false", "", "CRI's labels", "not false"),
    ("1.7", 'snapshotter = "imgsnap"', 'snapshotter = "zfs"', "CRI's snapshotter", "zfs"),
    ("1.7", '  snapshotter = "imgsnap"', "", "CRI's snapshotter", "overlayfs"),
    ("2.x", 'annotations = "true"', "annotations = true", "image annotations", "not reach"),
    ("2.x", "exports]", "other]", "image annotations", "not reach"),
    ("2.x", "transfer.v1", "other.v1", "unpack_config", "none has"),
    ("2.x", 'root = "/', 'root = "', "snapshotter's root", "'var/lib"),
    ("2.x", "cri.v1.images", "grpc.v1.cri", "CRI's snapshotter", "a version 3 file lacks"),
    ("2.x", "version = 3", "version = 1", "proxy plugin", "version 1"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "right", "wrong", "where", "said"), MISTAKES)
def test_mistakes(tmp_path, address, version, right, wrong, where, said):
    text = good(address, version)
    assert right in text
    check = findings(tmp_path, address, text.replace(right, wrong))[where]
    assert check.status is Status.WARN and said in check.detail


def test_old_pulls_of_a_new_containerd(tmp_path, address):
    text = good(address, "2.x") + "  disable_snapshot_annotations = false\n"
    check = findings(tmp_path, address, text)["CRI's labels"]
    assert check.status is Status.WARN and "old way" in check.detail


def test_cri_switched_off(tmp_path, address):
    text = 'disabled_plugins = ["cri"]\n' + good(address, "1.7")
    checks = findings(tmp_path, address, text)
    assert checks["CRI"].status is Status.WARN and "CRI's snapshotter" not in checks


def test_no_socket(tmp_path):
    address = tmp_path / "nothing"
    check = findings(tmp_path, address, good(address, "1.6"))["proxy plugin"]
    assert check.status is Status.WARN and "is not there" in check.detail


def test_the_running_version_decides_what_matters(tmp_path, address):
    checks = findings(tmp_path, address, good(address, "1.7"), containerd=(2, 1))
    assert checks["unpack_config"].status is Status.WARN
    assert checks["image annotations"].status is Status.WARN


def test_no_file(tmp_path, address):
    [check] = examine_containerd(address, file=tmp_path / "none.toml")
    assert check.status is Status.WARN and "does not exist" in check.detail and check.hint


@pytest.mark.parametrize(
    "text",
    [
        "version = ",
        'version = "two"',
        "proxy_plugins = 3",
        "plugins = []",
        "imports = 3",
        'imports = ["missing.toml"]',
        "version = 2\n# \xff",
    ],
)
def test_files_that_make_no_sense(tmp_path, address, text):
    file = tmp_path / "config.toml"
    file.write_bytes(text.encode("latin-1"))
    [check] = examine_containerd(address, file=file)
    assert check.status is Status.WARN and str(tmp_path) in check.detail


def test_tables_of_other_shapes_are_no_crash(tmp_path, address):
    plugin = f'[proxy_plugins.imgsnap]\ntype = "snapshot"\naddress = "{address}"\n'
    for text in (
        f"{plugin}exports = 3\n",
        f'{plugin}[plugins]\n"io.containerd.grpc.v1.cri" = 3\n',
        f'{plugin}[plugins."io.containerd.grpc.v1.cri"]\ncontainerd = "x"\n',
        f'{plugin}[plugins."io.containerd.transfer.v1.local"]\nunpack_config = 3\n',
        f'{plugin}[plugins."io.containerd.transfer.v1.local"]\nunpack_config = [3]\n',
    ):
        for version in (2, 3):
            findings(tmp_path, address, f"version = {version}\n{text}")


def test_imports_have_a_limit_and_may_be_circular(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('version = 2\nimports = ["c.toml", "*.toml"]\n')
    assert read_config(file).files == (file,)
    for number in range(FILES_MAX):
        (tmp_path / f"{number}.toml").write_text("version = 2\n")
    with pytest.raises(InvalidArgument, match="more than"):
        read_config(file)


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.6.20~ds1", (1, 6)), ("v2.1.9", (2, 1)), ("2.x", (2, 0)), ("1.7", (1, 7))],
)
def test_versions(text, version):
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "x", "1", "1.5.18", "two.x"])
def test_no_versions(text):
    with pytest.raises(InvalidArgument) as caught:
        parse_version(text)
    assert caught.value.hint


@pytest.mark.parametrize("path", ["relative/s", "/a\nb"])
def test_paths_that_containerd_would_misread(path):
    with pytest.raises(InvalidArgument):
        snippet((2, 0), Path(path), ROOT, "linux/amd64")
    with pytest.raises(InvalidArgument):
        snippet((2, 0), Path("/s"), Path(path), "linux/amd64")
