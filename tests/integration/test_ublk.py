"""ublk disks, in a guest: only there is the driver. One boot serves all tests.

The guest's root is an image converted by us, with the product in it, read lazily through a file of
`imgsnap attach`.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import REPOSITORY, Cli
from tests.support.guest import Guest, kit, running_guest
from tests.support.guest_image import PYTHON, python_image
from tests.support.image_builder import image, write_layout
from tests.support.node import node_daemon
from tests.support.samples import many_files, noise

pytestmark = pytest.mark.root

FILES, SIZE = 120, 20_000
BIG_FILES, BIG_SIZE = 6, 2_000_000
STEPS = "srv/ublk_steps.py"


def snapshots(cli: Cli) -> dict[str, bytes]:
    """Converts the snapshots of the steps into the store; their devices' bytes."""
    files = {}
    for name, count, size in (("app", FILES, SIZE), ("big", BIG_FILES, BIG_SIZE)):
        write_layout(cli.root / name, image(many_files(size=size, count=count)))
        cli.convert(f"oci:{cli.root}/{name}", f"store:{name}")
        path = cli("attach", f"store:{name}").out.strip()
        files[f"srv/{name}.raw"] = Path(path).read_bytes()
        cli("detach", path)
    return files


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    root = tmp_path_factory.mktemp("ublk")
    inner, outer = Cli(root / "inner"), Cli(root / "outer")
    with node_daemon(inner):
        files = snapshots(inner)
    files[STEPS] = (REPOSITORY / "tests/support/ublk_steps.py").read_bytes()
    write_layout(root / "image", python_image(inner.store, files))
    outer.convert(f"oci:{root}/image", "store:guest")
    with node_daemon(outer):
        disk = Path(outer("attach", "store:guest").out.strip())
        with running_guest(kit(), [disk], modules=["ublk_drv"], memory_mib=512, cpus=2) as running:
            yield running


def step(guest: Guest, name: str) -> str:
    return guest.check(f"{PYTHON} /{STEPS} {name}", limit_s=120)


def tree_digest() -> str:
    found = hashlib.sha256()
    for name, number in sorted((f"f{number:02}", number) for number in range(FILES)):
        found.update(name.encode() + noise(SIZE, number))
    return found.hexdigest()


def test_a_mounted_disk_has_the_images_files(guest: Guest) -> None:
    assert f"tree {tree_digest()}\n" in step(guest, "mount_and_compare")


@pytest.mark.parametrize(
    "name",
    [
        "disk_is_the_device",
        "parallel_reads",
        "idle_memory_is_given_back",
        "killed_with_reads_in_flight",
        "stopped_server_stalls_and_loses_nothing",
        "detach_while_in_use",
        "daemon_killed_whole",
        "number_taken",
        "not_root",
        "a_jails_node_of_another_user",
        "stop_takes_disks_away",
        "no_driver",  # last: it removes it
    ],
)
def test_in_the_guest(guest: Guest, name: str) -> None:
    print(step(guest, name))
