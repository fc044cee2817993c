"""`imgsnap pull --containerd` into real containerds, through our snapshotter."""

import contextlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest, chain_ids
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository
from imgsnap.snapshotter import labels as names
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.find_image import Finder
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot
from imgsnap.snapshotter.serve import opened, start_server
from tests.support.cli import Cli
from tests.support.containerd import VERSIONS, Containerd, release, running_containerd
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import Blobs, collect, image
from tests.support.samples import program_tar
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
SNAPSHOT = Digest("sha256:" + "5" * 64)


@dataclass
class Shown:
    """Finds one image, by its manifest, and shows its tree from a directory; remembers labels."""

    tree: Path
    manifest: str = ""
    snapshot: ImageSnapshot | None = None
    asked: list[Mapping[str, str]] = field(default_factory=list)

    def find(self, labels: Mapping[str, str]) -> ImageSnapshot | None:
        self.asked.append(dict(labels))
        return self.snapshot if labels.get(names.MANIFEST_DIGEST) == self.manifest else None

    def opened(self, found: ImageSnapshot) -> None:
        pass

    def gone(self, labels: Mapping[str, str]) -> None:
        raise AssertionError("every snapshot is there")

    def show(self, repository: str, snapshot: Digest) -> Path:
        return self.tree

    def release(self, snapshot: Digest) -> None:
        pass

    def shown(self) -> list[Digest]:
        return []

    def knows(self, blobs: Blobs, tars: list[bytes]) -> None:
        """That an image, of these layers, has a snapshot."""
        self.manifest = blobs.names[0][1]["digest"]
        document = json.loads(blobs.by_digest[self.manifest])
        config = json.loads(blobs.by_digest[document["config"]["digest"]])
        diff_ids = config["rootfs"]["diff_ids"]
        rows = zip(diff_ids, document["layers"], chain_ids(diff_ids), strict=True)
        layers = [ImageLayer(d, b["digest"], b["size"], b["mediaType"], c) for d, b, c in rows]
        self.snapshot = ImageSnapshot("r/x", SNAPSHOT, tuple(layers))
        self.unpack(tars)

    def unpack(self, tars: list[bytes]) -> None:
        self.tree.mkdir(exist_ok=True)
        for tar in tars:
            with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
                archive.extractall(self.tree, filter="fully_trusted")


@pytest.fixture
def shown(tmp_path: Path, cli: Cli) -> Iterator[Shown]:
    """A running snapshotter."""
    shown = Shown(tmp_path / "tree")
    with opened(tmp_path / "snapshotter", finder=shown, devices=shown) as snapshots:
        server = start_server(snapshots, cli.run_dir / "s")
        try:
            yield shown
        finally:
            server.stop(0).wait()


def layers() -> list[bytes]:
    return [program_tar(), layer_tar([Item(b"data/file", content=b"from the snapshot")])]


def pushed(registry: DockerRegistry, name: str) -> tuple[str, Blobs]:
    run = {"Entrypoint": ["/bin/busybox", "cat"], "Cmd": ["/data/file"]}
    blobs = collect(image(*layers(), run=run), "1")
    return registry.put(name, blobs), blobs


@contextlib.contextmanager
def with_plugin(cli: Cli, series: str) -> Iterator[Containerd]:
    with running_containerd(release(series), snapshotter=cli.run_dir / "s") as containerd:
        yield containerd


def pull(cli: Cli, containerd: Containerd, reference: str) -> list[str]:
    place = ["--address", str(containerd.socket)]
    return ["pull", "--containerd", *place, reference]


def everything(containerd: Containerd) -> list[str]:
    """What containerd holds, in words."""
    commands = [
        "images ls -q",
        "content ls -q",
        "leases ls -q",
        "snapshots --snapshotter imgsnap ls",
    ]
    lines = [line for c in commands for line in containerd.ctr(*c.split()).splitlines()]
    return [" ".join(line.split()) for line in lines]


NOTHING = ["KEY PARENT KIND"]


@pytest.mark.parametrize("series", VERSIONS)
def test_only_documents_are_fetched_and_all_goes_away(
    series: str, cli: Cli, shown: Shown, registry: DockerRegistry, name: str
):
    reference, blobs = pushed(registry, name)
    shown.knows(blobs, layers())
    assert shown.snapshot is not None
    with with_plugin(cli, series) as containerd:
        registry.accesses()
        out = cli(*pull(cli, containerd, reference)).out
        assert out == f"{reference}@{shown.manifest}\n"
        gets = [access.path for access in registry.accesses() if "/blobs/" in access.path]
        fetched = {layer.digest for layer in shown.snapshot.layers}
        assert len(gets) == 1 and not any(digest in gets[0] for digest in fetched)
        assert containerd.run(reference, snapshotter="imgsnap") == "from the snapshot"
        asked = shown.asked[-1]
        assert asked[names.IMAGE_REF] == reference
        assert asked[names.IMAGE_LAYERS] == shown.snapshot.layers[-1].digest
        assert cli(*pull(cli, containerd, reference)).out == out  # again: no harm
        containerd.remove_image(reference)
        assert everything(containerd) == NOTHING


@pytest.mark.parametrize("series", VERSIONS)
def test_an_image_that_was_pulled_for_another_snapshotter(
    series: str, cli: Cli, shown: Shown, registry: DockerRegistry, name: str
):
    """Its content is there without the labels that keep our rows from the garbage collector."""
    reference, blobs = pushed(registry, name)
    shown.knows(blobs, layers())
    with with_plugin(cli, series) as containerd:
        containerd.pull(reference)
        cli(*pull(cli, containerd, reference))
        other = pushed(registry, f"{name}-2")[0]
        containerd.pull(other)
        containerd.remove_image(other)  # a garbage collection
        assert len(containerd.snapshots("imgsnap")) == 2
        assert containerd.run(reference, snapshotter="imgsnap") == "from the snapshot"
        assert containerd.run(reference) == "from the snapshot"
        containerd.remove_image(reference)
        assert everything(containerd) == NOTHING


@pytest.mark.parametrize("series", VERSIONS)
def test_an_image_without_a_snapshot(
    series: str, cli: Cli, shown: Shown, registry: DockerRegistry, name: str
):
    reference, _ = pushed(registry, name)
    with with_plugin(cli, series) as containerd:
        err = cli.fails(4, *pull(cli, containerd, reference))
        assert "has no snapshot" in err and f"--snapshotter imgsnap {reference}" in err
        assert everything(containerd) == NOTHING
        containerd.pull(reference, snapshotter="imgsnap")  # what the hint says
        assert containerd.run(reference, snapshotter="imgsnap") == "from the snapshot"


def test_an_index_keeps_its_name(cli: Cli, shown: Shown, registry: DockerRegistry, name: str):
    images = [image(*layers(), architecture=arch) for arch in ("amd64", "s390x")]
    blobs = collect(images, "1")
    reference = registry.put(name, blobs)
    one = collect(images[0])
    shown.knows(one, layers())
    index = blobs.names[0][1]["digest"]
    pinned = reference.rpartition(":")[0] + f"@{index}"
    with with_plugin(cli, "1.6") as containerd:
        for ref in (reference, pinned):
            command = pull(cli, containerd, ref)
            assert cli(*command, "--platform", "linux/amd64").out.strip().endswith(index)
            out = containerd.run(ref, "/bin/busybox", "cat", "/data/file", snapshotter="imgsnap")
            assert out == "from the snapshot"
        assert "s390" in cli.fails(4, *command, "--platform", "linux/mips")
        containerd.remove_image(reference)
        containerd.remove_image(pinned)
        assert everything(containerd) == NOTHING


def test_namespaces_and_addresses(cli: Cli, shown: Shown, registry: DockerRegistry, name: str):
    reference, blobs = pushed(registry, name)
    shown.knows(blobs, layers())
    with with_plugin(cli, "1.6") as containerd:
        environ = {"CONTAINERD_ADDRESS": str(containerd.socket), "CONTAINERD_NAMESPACE": "one"}
        cli("pull", "--containerd", reference, env=environ)
        cli("pull", "--containerd", "--namespace", "k8s.io", reference, env=environ)
        for namespace in ("one", "k8s.io"):
            listed = containerd.ctr("images", "ls", "-q", namespace=namespace)
            assert reference in listed
            out = containerd.run(reference, snapshotter="imgsnap", namespace=namespace)
            assert out == "from the snapshot"
        assert containerd.ctr("images", "ls", "-q") == ""
        for namespace in ("one", "k8s.io"):
            containerd.remove_image(reference, namespace=namespace)
            assert containerd.snapshots("imgsnap", namespace=namespace) == []


@pytest.mark.parametrize("form", ["snapshot", "image"])
@pytest.mark.parametrize("series", VERSIONS)
def test_found_by_the_finder(
    series: str, form: str, cli: Cli, tmp_path: Path, registry: DockerRegistry, name: str
):
    """A converted image, and an ordinary one by its referrer, as `imgsnap convert` makes them."""
    source, _ = pushed(registry, name)
    target = f"{source}-converted"
    cli("convert", "--progress", "none", "--as", form, source, target)
    reference = target if form == "image" else source
    shown = Shown(tmp_path / "tree")
    shown.unpack(layers())
    finder = Finder(
        opened_registry,
        lambda _: True,
        Catalogue(tmp_path / "known"),
        NodeCache(tmp_path / "cache"),
    )
    with opened(tmp_path / "rows", finder=finder, devices=shown) as snapshots:
        server = start_server(snapshots, cli.run_dir / "s")
        try:
            with with_plugin(cli, series) as containerd:
                registry.accesses()
                cli(*pull(cli, containerd, reference))
                fetched = [
                    a for a in registry.accesses() if "/blobs/" in a.path and a.size > 10_000
                ]
                assert fetched == []  # busybox is in a layer
                assert containerd.run(reference, snapshotter="imgsnap") == "from the snapshot"
                assert len(containerd.snapshots("imgsnap")) == (1 if form == "image" else 2)
                containerd.remove_image(reference)
                assert everything(containerd) == NOTHING
        finally:
            server.stop(0).wait()


def opened_registry(location: RegistryLocation) -> Repository:
    return open_repository(location, RegistryOptions(), store=Path("/none"), environ={})[0]


def test_mistakes(cli: Cli, shown: Shown, registry: DockerRegistry, name: str):
    reference, _ = pushed(registry, name)
    nobody = ["pull", "--containerd", "--address", str(cli.run_dir / "no"), reference]
    assert "containerd on" in cli.fails(6, *nobody, hint=False)
    with running_containerd(release("1.6")) as containerd:
        command = pull(cli, containerd, reference)
        assert "imgsnap doctor" in cli.fails(2, *command)
        assert containerd.ctr("leases", "ls", "-q") == ""
        cli.fails(2, *command, "--snapshotter", "overlayfs/../x")
    cli.fails(2, "pull", "--containerd", "store:x")
    cli.fails(2, "pull", "--containerd", reference, "store:x")
    cli.fails(2, "pull", "--namespace", "x", reference)
    assert "missing" in cli.fails(4, *nobody[:-1], f"{reference}-missing", hint=False)
