"""The doctor, shown machines made of directories."""

from pathlib import Path

import pytest

from imgsnap.errors import Unsupported
from imgsnap.mount.doctor import Check, Host, Status, check_kernel, examine


def machine(root: Path, filesystems: str = "nodev\tfuse\n\terofs\nnodev\toverlay\n") -> Host:
    (root / "proc").mkdir()
    (root / "proc/filesystems").write_text(filesystems)
    return Host(root=root, uid=0, release="6.18.0-test", load_module=lambda name: False)


def by_name(host: Host, **attempts) -> dict[str, Check]:
    return {check.name: check for check in examine(host, **attempts)}


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("6.12.0", Status.OK),
        ("7.0.1", Status.OK),
        ("6.11.9", Status.WARN),
        ("5.4.0-42", Status.WARN),
        ("5.3.18", Status.FAIL),
        ("unknown", Status.FAIL),
    ],
)
def test_kernel_versions(tmp_path, release, status):
    assert check_kernel(Host(root=tmp_path, release=release)).status is status


def test_a_machine_with_filesystems_but_no_devices(tmp_path):
    checks = by_name(machine(tmp_path))
    assert checks["erofs file system"].status is Status.OK
    assert checks["fuse device"].status is Status.FAIL
    assert checks["ublk control device"].status is Status.WARN
    assert checks["containerd"].status is Status.WARN
    assert all(check.hint for check in checks.values() if check.status is not Status.OK)
    assert "file-backed EROFS mount" not in checks  # nothing was given to try it with


def test_a_missing_module_is_loaded(tmp_path):
    host = machine(tmp_path, "nodev\tfuse\n")

    def load(name: str) -> bool:
        with (tmp_path / "proc/filesystems").open("a") as file:
            file.write(f"\t{name}\n")
        return True

    host = Host(root=tmp_path, uid=1000, release=host.release, load_module=load)
    checks = by_name(host)
    assert checks["erofs file system"].detail == "module loaded"
    assert checks["root"].status is Status.FAIL


def test_attempts_report_what_they_met(tmp_path):
    def refuse() -> str:
        raise Unsupported("ENOTBLK", hint="newer kernel")

    checks = by_name(machine(tmp_path), try_mount=refuse, probe_ranges=lambda: "206")
    assert checks["file-backed EROFS mount"] == Check(
        "file-backed EROFS mount", Status.WARN, "ENOTBLK", "newer kernel"
    )
    assert checks["registry range requests"].status is Status.OK


def test_on_this_machine_every_check_has_an_answer():
    for check in examine():
        assert check.detail
