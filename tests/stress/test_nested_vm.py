"""A microVM on a ublk disk, inside an emulated guest: only there is the driver. Takes minutes."""

import hashlib
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY, Cli
from tests.support.guest import kit, running_guest
from tests.support.guest_image import PYTHON, python_image
from tests.support.image_builder import image, write_layout
from tests.support.kit_image import ROOT, kit_image
from tests.support.node import node_daemon
from tests.support.samples import noise, program_tar
from tests.support.tars import Item, layer_tar

pytestmark = pytest.mark.root

NOISE = 3_000_000
STEPS = "srv/nested_vm_steps.py"
LIMIT_S = 600.0
SCRIPT = "echo inner; sha256sum /noise; cat /sys/class/block/vda/size; exit 5"


def test_a_guest_boots_from_a_ublk_disk(tmp_path: Path) -> None:
    inner, outer = Cli(tmp_path / "inner"), Cli(tmp_path / "outer")
    layers = (program_tar(), layer_tar([Item(b"noise", content=noise(NOISE, 3))]))
    write_layout(tmp_path / "app", image(*layers, run={"Env": ["PATH=/bin"]}))
    inner.convert(f"oci:{tmp_path}/app", "store:app")
    steps = (REPOSITORY / "tests/support/nested_vm_steps.py").read_bytes()
    write_layout(tmp_path / "guest", python_image(inner.store, {STEPS: steps}))
    write_layout(tmp_path / "kit", kit_image(kit()))
    for name in ("guest", "kit"):
        outer.convert(f"oci:{tmp_path}/{name}", f"store:{name}")
    kernel = f"--kernel {ROOT}/vmlinuz --modules {ROOT}/modules --memory 128MiB"
    run = f"{PYTHON} /{STEPS} {kernel} --via ublk store:app -- /bin/busybox sh -c '{SCRIPT}'"
    with node_daemon(outer):
        disks = [Path(outer("attach", f"store:{name}").out.strip()) for name in ("guest", "kit")]
        with running_guest(kit(), disks, modules=["ublk_drv"], memory_mib=1024, cpus=2) as guest:
            guest.check(f"mount -t erofs -o ro /dev/vdb {ROOT}")
            done = guest.run(f"PATH={ROOT}:$PATH {run}", limit_s=LIMIT_S)
            left = guest.run("ls /dev/ublkb* /sys/class/ublk-char; ps")
    assert done.status == 5, done.output
    word, digest, sectors = done.output.splitlines()[-3:]
    assert (word, digest.split()[0]) == ("inner", hashlib.sha256(noise(NOISE, 3)).hexdigest())
    assert int(sectors) % (4096) == 0, "2 MiB"
    assert "ublkb" not in left.output.replace("/dev/ublkb*", "") and "qemu" not in left.output
