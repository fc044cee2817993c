"""Mount forms: what containerd and Kata's runtime see of a snapshot, on real mounts."""

from pathlib import Path

import pytest

from imgsnap.mount import linux
from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, release, running_containerd
from tests.support.docker_registry import DockerRegistry
from tests.support.installed import HTTP, NAME, ours, pull, reached, run, shown_from
from tests.support.mounts import unmount
from tests.support.node import wait_for

pytestmark = [pytest.mark.root, pytest.mark.registry]


@pytest.mark.parametrize("series", VERSIONS[1:])  # 1.6's ctr wants the layers for that
def test_a_view_is_mounted_from_the_file_itself(
    series: str, cli: Cli, own_registry: DockerRegistry, fast: str
):
    with (
        ours(cli, "--mount-form", "erofs") as it,
        running_containerd(release(series), snapshotter=it.socket) as containerd,
    ):
        pull(cli, containerd, own_registry, fast)
        place = containerd.work / "seen"
        place.mkdir()
        where = ("--snapshotter", NAME, fast, place)  # containerd's own code mounts the view
        containerd.ctr("images", "mount", *map(str, where), namespace="k8s.io")
        try:
            (point,) = [point for point in linux.mount_points() if point.target == place]
            assert (point.fstype, Path(point.source)) == ("erofs", shown_from(it))
            assert Path(point.source).name == "layer.erofs"
            assert (place / "app").read_text() == "the app\n"
        finally:
            unmount(place)
        view = ("snapshots", "--snapshotter", NAME, "rm", str(place))
        containerd.ctr(*view, namespace="k8s.io")
        assert run(containerd, fast, "cat /app; echo 1 > /app; cat /app") == "the app\n1\n"
        containerd.remove_image(fast, namespace="k8s.io")
        wait_for(lambda: it.states() == [] and it.shown() == [], "nothing left")


@pytest.mark.parametrize("one_file", [True, False])
def test_what_kata_finds_below_a_container(
    one_file: bool, cli: Cli, own_registry: DockerRegistry, fast: str
):
    """Its Go runtime takes an overlay's lower if mountinfo names a `layer.erofs` as its source. A
    snapshot that is complete on the node is in several files, unless one is asked for."""
    with (
        ours(cli, *(["--one-file"] if one_file else [])) as it,
        running_containerd(release("2.1"), snapshotter=it.socket) as containerd,
    ):
        containerd.allow_http(own_registry.address)
        cli("warm", HTTP, "--progress", "none", fast)
        pull(cli, containerd, own_registry, fast)
        source = shown_from(it)
        assert (source.name == "layer.erofs") == one_file, source
        if one_file:  # and it is the whole of it
            place = containerd.work / "seen"
            place.mkdir()
            linux.mount(str(source), place, "erofs", linux.MountFlag.RDONLY)
            assert (place / "app").read_text() == "the app\n"
            unmount(place)
        assert run(containerd, fast, "cat /app") == "the app\n"


def test_a_node_that_begins_to_want_one_file(cli: Cli, own_registry: DockerRegistry, fast: str):
    """What was shown in another way is shown anew; containers go on."""
    with (
        ours(cli) as it,
        running_containerd(release("1.6"), snapshotter=it.socket) as containerd,
    ):
        containerd.allow_http(own_registry.address)
        cli("warm", HTTP, "--progress", "none", fast)
        pull(cli, containerd, own_registry, fast)
        assert shown_from(it).name != "layer.erofs"
        it.kill()
        it.options = ("--one-file",)
        it.start()
        wait_for(lambda: reached(containerd), "containerd's next attempt to connect")
        assert run(containerd, fast, "cat /app") == "the app\n"
        assert shown_from(it).name == "layer.erofs"
