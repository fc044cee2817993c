"""Images as containerd pulls them, with the real finder, unpacker, registry and EROFS mounts."""

import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest
from imgsnap.errors import Busy
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository
from imgsnap.snapshotter import serve
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.find_image import Finder
from imgsnap.snapshotter.unpack_layer import Unpacker
from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, Containerd, release, running_containerd
from tests.support.cri import cri
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.samples import program_tar
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
NAME, HTTP, BUSYBOX = "imgsnap", "--plain-http", "/bin/busybox"
MIDDLE = layer_tar([Item(b"tmp/middle", content=b"middle\n"), Item(b"etc/.wh.group")])
APP = layer_tar([Item(b"app", content=b"the app\n"), Item(b"bin/.wh.sleep")])
OTHER = layer_tar([Item(b"other", content=b"the other\n")])


def opened(location: RegistryLocation) -> Repository:
    options = RegistryOptions(plain_http=True, connect_timeout_s=2, read_timeout_s=10)
    repository, _ = open_repository(location, options, store=Path("/nonexistent"), environ={})
    return repository


@dataclass
class Mounts:
    """Devices by `imgsnap mount`."""

    cli: Cli
    root: Path

    def show(self, repository: str, snapshot: Digest) -> Path:
        path = self.root / snapshot[7:]
        if not path.exists():
            self.cli("mount", HTTP, f"{repository}@{snapshot}", path)
        return path

    def release(self, snapshot: Digest) -> None:
        done = self.cli.any("umount", self.root / snapshot[7:])
        if done.code:
            raise Busy(done.err)

    def shown(self) -> list[Digest]:
        return [Digest(f"sha256:{path.name}") for path in self.root.iterdir()]


@dataclass
class Node:
    containerd: Containerd
    pull: object
    remove: object
    snapshots: object

    def states(self) -> list[str]:
        return [str(row.state) for row in self.snapshots.list([])]

    def shell(self, reference: str, command: str) -> str:
        """What a command that always prints something prints.

        ctr stops copying as soon as the container has ended, and on a busy machine has sometimes
        copied nothing: the end of the output has a mark, and who does not see it asks again.
        """
        where = {"snapshotter": NAME, "namespace": "k8s.io"}
        for _ in range(5):
            marked = f"{command}; echo -n .end."
            out = self.containerd.run(reference, BUSYBOX, "sh", "-c", marked, **where)
            if out.endswith(".end."):
                return out.removesuffix(".end.")
        raise AssertionError(f"no whole output of {command!r}: {out!r}")


@contextmanager
def node(series: str, cli: Cli, registry: DockerRegistry) -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work:
        root = Path(work)
        devices = Mounts(cli, root / "devices")
        devices.root.mkdir()
        finder = Finder(
            opened, lambda location: True, Catalogue(root / "known"), NodeCache(root / "cache")
        )
        unpacker = Unpacker(opened, root / "work")
        try:
            with serve.opened(root / "state", serve.Parts(finder, devices, unpacker)) as snapshots:
                server = serve.start_server(snapshots, root / "s.sock")
                try:
                    with running_containerd(
                        release(series), snapshotter=root / "s.sock", cri=True
                    ) as containerd:
                        containerd.allow_http(registry.address)
                        with cri(containerd.socket) as calls:
                            yield Node(containerd, calls.pull, calls.remove_image, snapshots)
                finally:
                    server.stop(0).wait()
        finally:
            for snapshot in devices.shown():
                devices.release(snapshot)


def layer_gets(registry: DockerRegistry, *blobs: str) -> list[str]:
    found = [a.path for a in registry.accesses() if a.method == "GET" and "/blobs/" in a.path]
    return [path for path in found if any(blob in path for blob in blobs)]


@pytest.mark.parametrize("series", VERSIONS)
def test_a_converted_image(series: str, cli: Cli, registry: DockerRegistry, name: str):
    run = {"Env": ["GREETING=hello"], "WorkingDir": "/srv"}
    remote = registry.put(name, collect(image(program_tar(), MIDDLE, APP, run=run), "1.0"))
    fast = f"{registry.address}/{name}:1.0-fast"
    cli.convert(remote, fast, HTTP, "--as", "image")
    index = json.loads(cli.bytes_of("inspect", HTTP, "--raw", fast))
    repository = f"{registry.address}/{name}"
    digest = index["manifests"][0]["digest"]
    manifest = json.loads(cli.bytes_of("inspect", HTTP, "--raw", f"{repository}@{digest}"))
    with node(series, cli, registry) as it:
        registry.accesses()
        it.pull(fast)
        assert layer_gets(registry, manifest["layers"][0]["digest"]) == []
        assert it.states() == ["device"]
        assert it.shell(fast, "cat /app; echo $GREETING; pwd") == "the app\nhello\n/srv\n"
        assert (
            it.shell(fast, "stat -c %a /tmp; ls /tmp; test -e /etc/group || echo gone")
            == "1777\nmiddle\ngone\n"
        )
        it.remove(fast)


@pytest.mark.parametrize("series", VERSIONS)
def test_an_ordinary_image_with_a_snapshot_and_another_on_its_layers(
    series: str, cli: Cli, registry: DockerRegistry, name: str
):
    base = program_tar()
    contents = [collect(image(base, MIDDLE, APP)), collect(image(base, MIDDLE, OTHER))]
    app, other = (registry.put(f"{name}-{n}", found) for n, found in enumerate(contents))
    manifest = json.loads(contents[0].by_digest[contents[0].names[0][1]["digest"]])
    blobs = [layer["digest"] for layer in manifest["layers"]]
    cli.convert(app, f"{registry.address}/{name}-0:snap", HTTP)
    with node(series, cli, registry) as it:
        registry.accesses()
        it.pull(app)
        assert layer_gets(registry, *blobs) == []
        assert it.states() == ["placeholder", "placeholder", "device"]
        assert (
            it.shell(app, "cat /app; stat -c %a /tmp; test -e /etc/group || echo gone")
            == "the app\n1777\ngone\n"
        )
        it.pull(other)
        assert sorted(path.rpartition("/")[2] for path in layer_gets(registry, *blobs)) == sorted(
            blobs[:2]
        )
        # The middle layer has no entry for tmp: it is the base's.
        seen = it.shell(
            other,
            "cat /other /tmp/middle; stat -c %a /tmp; test -e /etc/group || echo gone;"
            "ls /bin/sleep",
        )
        assert seen == "the other\nmiddle\n1777\ngone\n/bin/sleep\n"
        assert it.shell(app, "cat /app; test -e /bin/sleep || echo gone") == "the app\ngone\n"
        it.remove(app)
        assert it.shell(other, "cat /tmp/middle") == "middle\n"
        it.remove(other)


def test_an_unconverted_image_just_works(cli: Cli, registry: DockerRegistry, name: str):
    remote = registry.put(name, collect(image(program_tar(), MIDDLE, APP)))
    with node("1.6", cli, registry) as it:
        it.pull(remote)
        assert it.states() == ["layer"] * 3
        assert it.shell(remote, "cat /app; stat -c %a /tmp") == "the app\n1777\n"
        it.remove(remote)


def test_the_distributions_containerd_takes_a_converted_image_for_an_image(
    cli: Cli, registry: DockerRegistry, name: str
):
    """Without the plugin: the first entry is chosen, and its stub unpacked."""
    remote = registry.put(name, collect(image(program_tar()), "1.0"))
    fast = f"{registry.address}/{name}:fast"
    cli.convert(remote, fast, HTTP, "--as", "image")
    with running_containerd(release("1.6")) as containerd:
        containerd.pull(fast, snapshotter="overlayfs")
        listed = containerd.ctr("images", "ls")
        assert fast in listed and "linux/amd64" in listed
        with tarfile.open(fileobj=_exported(containerd, fast)) as archive:
            assert "index.json" in archive.getnames()


def _exported(containerd: Containerd, reference: str):
    import io

    path = containerd.work / "export.tar"
    containerd.ctr("images", "export", str(path), reference)
    return io.BytesIO(path.read_bytes())
