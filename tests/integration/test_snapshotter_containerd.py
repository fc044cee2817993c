"""Our snapshotter below a real containerd: images, containers, kills, garbage collection."""

import contextlib
import io
import random
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from imgsnap.digest import Digest
from imgsnap.snapshotter import serve
from imgsnap.snapshotter.labels import MANIFEST_DIGEST
from imgsnap.snapshotter.report import check_root
from imgsnap.snapshotter.seams import ImageLayer, ImageSnapshot
from tests.support.containerd import (
    VERSIONS,
    Containerd,
    fresh_id,
    release,
    running_containerd,
)
from tests.support.cri import cri
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import Image, collect, image, sha256, write_oci_archive
from tests.support.samples import program_tar
from tests.support.snapshots_client import SnapshotsClient
from tests.support.snapshotter import Snapshotter, running_snapshotter
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
NAME = "imgsnap"
BUSYBOX = "/bin/busybox"


def layers() -> list[bytes]:
    """A program; a directory; a layer with a whiteout and an opaque directory."""
    first = [
        Item(b"d", tarfile.DIRTYPE, mode=0o755),
        Item(b"d/keep", content=b"kept\n"),
        Item(b"d/gone", content=b"gone"),
        Item(b"d/o", tarfile.DIRTYPE, mode=0o755),
        Item(b"d/o/hidden", content=b"hidden"),
    ]
    second = [
        Item(b"d/.wh.gone"),
        Item(b"d/o", tarfile.DIRTYPE, mode=0o755),
        Item(b"d/o/.wh..wh..opq"),
        Item(b"d/o/new", content=b"new"),
    ]
    return [program_tar(), layer_tar(first), layer_tar(second)]


SEEN = ".\n./keep\n./o\n./o/new\nkept\n"


@pytest.fixture
def ours() -> Iterator[Snapshotter]:
    with (
        tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work,
        running_snapshotter(Path(work)) as running,
    ):
        yield running


def show(containerd: Containerd, reference: str, snapshotter: str, **options: str) -> str:
    command = "cd /d && /bin/busybox find . | /bin/busybox sort && /bin/busybox cat keep"
    return containerd.run(
        reference, BUSYBOX, "sh", "-c", command, snapshotter=snapshotter, **options
    )


def eventually(what: Callable[[], bool], within: float = 30) -> None:
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("series", VERSIONS)
def test_pull_run_remove(series: str, ours: Snapshotter, registry: DockerRegistry, name: str):
    reference = registry.put(name, collect(image(*layers())))
    with running_containerd(release(series), snapshotter=ours.socket) as containerd:
        containerd.pull(reference, snapshotter=NAME)
        assert show(containerd, reference, NAME) == SEEN
        containerd.pull(reference, snapshotter="overlayfs")
        assert show(containerd, reference, "overlayfs") == SEEN
        # the container's goes with the next garbage collection
        eventually(lambda: [row.state for row in ours.rows()] == ["layer"] * 3)
        assert all(row.usage for row in ours.rows())
        containerd.remove_image(reference)
        assert (ours.rows(), ours.files()) == ([], [])


def test_import_and_write(ours: Snapshotter, tmp_path: Path):
    write_oci_archive(tmp_path / "image.tar", image(*layers()), "test/app:1")
    with running_containerd(release("1.6"), snapshotter=ours.socket) as containerd:
        containerd.ctr(
            *("images", "import", "--base-name", "test/app", "--snapshotter", NAME),
            str(tmp_path / "image.tar"),
        )
        reference = containerd.ctr("images", "ls", "-q").splitlines()[0]
        write = "echo new > /d/keep && /bin/busybox rm -r /d/o && /bin/busybox cat /d/keep"
        for _ in range(2):  # the second container sees nothing of the first
            out = containerd.run(reference, BUSYBOX, "sh", "-c", write, snapshotter=NAME)
            assert out == "new\n"
        containerd.remove_image(reference)
        assert (ours.rows(), ours.files()) == ([], [])


def test_a_kill_disturbs_no_container(ours: Snapshotter, registry: DockerRegistry, name: str):
    reference = registry.put(name, collect(image(*layers())))
    with running_containerd(release("1.6"), snapshotter=ours.socket) as containerd:
        containerd.pull(reference, snapshotter=NAME)
        one = fresh_id()
        containerd.ctr(
            *("run", "--detach", "--net-host", "--snapshotter", NAME, reference, one),
            *(BUSYBOX, "sleep", "1000"),
        )

        def seen() -> str:
            command = [BUSYBOX, "cat", "/d/keep"]
            return containerd.ctr("tasks", "exec", "--exec-id", fresh_id("e"), one, *command)

        assert seen() == "kept\n"
        ours.kill()
        assert seen() == "kept\n"
        refused = containerd.ctr_fails("snapshots", "--snapshotter", NAME, "prepare", "x")
        assert "connect" in refused
        ours.start()
        assert seen() == "kept\n"
        listed = [*containerd.ctr_command(), "snapshots", "--snapshotter", NAME, "usage"]
        eventually(lambda: subprocess.run(listed, capture_output=True, timeout=30).returncode == 0)
        assert show(containerd, reference, NAME) == SEEN
        containerd.restart()
        assert seen() == "kept\n"
        containerd.ctr("tasks", "kill", "--signal", "9", one)
        eventually(lambda: "STOPPED" in containerd.ctr("tasks", "ls"))
        containerd.ctr("tasks", "rm", one)
        containerd.ctr("containers", "rm", one)
        containerd.remove_image(reference)
        assert (ours.rows(), ours.files()) == ([], [])


def test_what_containerd_removed_meanwhile_goes(
    ours: Snapshotter, registry: DockerRegistry, name: str
):
    """containerd collects garbage while we are away, and forgets; the next time it tells us all."""
    reference = registry.put(name, collect(image(*layers())))
    other = registry.put(f"{name}-2", collect(image(program_tar())))
    with running_containerd(release("1.6"), snapshotter=ours.socket) as containerd:
        containerd.pull(reference, snapshotter=NAME)
        ours.kill()
        containerd.ctr("images", "rm", reference)
        ours.start()
        assert len(ours.rows()) == 3

        def pulled() -> bool:
            command = [*containerd.ctr_command(), "images", "pull", "--plain-http"]
            command += ["--snapshotter", NAME, other]
            return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

        eventually(pulled)
        containerd.remove_image(other)
        assert (ours.rows(), ours.files()) == ([], [])


# Converted images: claimed, materialised, released ----------------------------------------------


@dataclass
class Converted:
    """All three seams for images of this test: trees of directories in place of EROFS devices."""

    root: Path
    images: dict[str, ImageSnapshot]
    trees: dict[str, list[bytes]]  # manifest digest: layer tars
    unpacked: list[str]

    def find(self, labels) -> ImageSnapshot | None:
        return self.images.get(labels.get(MANIFEST_DIGEST, ""))

    def opened(self, image: ImageSnapshot) -> None:
        pass

    def gone(self, labels) -> None:
        raise AssertionError("nothing is lost here")

    def show(self, repository: str, snapshot: Digest) -> Path:
        path = self.root / snapshot[7:]
        if not path.exists():
            path.mkdir(parents=True)
            for tar in self.trees[snapshot]:
                unpack(tar, path)
        return path

    def release(self, snapshot: Digest) -> None:
        subprocess.run(["rm", "-r", str(self.root / snapshot[7:])], check=True)

    def shown(self) -> list[Digest]:
        return [Digest(f"sha256:{p.name}") for p in self.root.iterdir()]

    def unpack(self, repository: str, layer: ImageLayer, directory: Path, lowers) -> None:
        tar = next(t for tars in self.trees.values() for t in tars if sha256(t) == layer.diff_id)
        unpack(tar, directory)
        self.unpacked.append(layer.diff_id)


def unpack(tar: bytes, directory: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        archive.extractall(directory, filter="fully_trusted")


def snapshot_of(built: Image, manifest: str, repository: str) -> ImageSnapshot:
    found: list[ImageLayer] = []
    for layer in built.layers:
        diff_id = sha256(layer.tar)
        chain = sha256(f"{found[-1].chain_id} {diff_id}".encode()) if found else diff_id
        size = len(layer.data)
        found.append(
            ImageLayer(Digest(diff_id), Digest(sha256(layer.data)), size, "x", Digest(chain))
        )
    return ImageSnapshot(repository, Digest(manifest), tuple(found))


@pytest.mark.parametrize("series", VERSIONS)
def test_a_converted_image_and_an_ordinary_one_on_its_base(
    series: str, registry: DockerRegistry, name: str
):
    base = program_tar()
    app = image(base, layer_tar([Item(b"app", content=b"the app\n")]))
    other = image(base, layer_tar([Item(b"other", content=b"the other\n")]))
    references, blobs = [], [collect(app), collect(other)]
    for number, content in enumerate(blobs):
        references.append(registry.put(f"{name}-{number}", content))
    manifest = blobs[0].names[0][1]["digest"]
    with tempfile.TemporaryDirectory(prefix="imgsnap-s-") as work:
        root = Path(work)
        (root / "devices").mkdir()
        parts = Converted(
            root / "devices",
            {manifest: snapshot_of(app, manifest, name)},
            {manifest: [layer.tar for layer in app.layers]},
            [],
        )
        with serve.opened(root / "state", finder=parts, devices=parts, unpacker=parts) as snapshots:
            server = serve.start_server(snapshots, root / "s.sock")
            try:
                _converted(series, registry, references, root / "s.sock", parts, snapshots)
            finally:
                server.stop(0).wait()


def _converted(series, registry, references, socket, parts, snapshots) -> None:
    layer_paths = {f"/blobs/{layer.digest}" for i in parts.images.values() for layer in i.layers}
    with running_containerd(release(series), snapshotter=socket, cri=True) as containerd:
        containerd.allow_http(registry.address)
        with cri(containerd.socket) as calls:
            registry.accesses()
            calls.pull(references[0])
            fetched = [a.path for a in registry.accesses() if a.method == "GET"]
            assert not [p for p in fetched if any(p.endswith(path) for path in layer_paths)]
            assert [row.state for row in snapshots.list([])] == ["placeholder", "device"]

            def cat(reference: str, file: str) -> str:
                arguments = {"snapshotter": NAME, "namespace": "k8s.io"}
                return containerd.run(reference, BUSYBOX, "cat", file, **arguments)

            assert cat(references[0], "/app") == "the app\n"
            assert parts.unpacked == []
            calls.pull(references[1])
            assert len(parts.unpacked) == 1
            assert cat(references[1], "/other") == "the other\n"
            assert cat(references[0], "/app") == "the app\n"
            calls.remove_image(references[0])
            assert cat(references[1], "/other") == "the other\n"
            eventually(lambda: parts.shown() == [])
            calls.remove_image(references[1])
            eventually(lambda: snapshots.list([]) == [])
            eventually(lambda: not list((socket.parent / "state/snapshots").iterdir()))


# Kills below containerd -----------------------------------------------------------------------


@dataclass
class Account:
    """What one client of containerd was promised."""

    name: str
    client: SnapshotsClient
    kinds: dict[str, str]
    number: int = 0

    def run(self, end: threading.Event, rng: random.Random) -> None:
        """Until a call fails; what that call was about is nobody's promise any more."""
        while not end.is_set():
            self.number += 1
            key = f"{self.name}-{self.number}"
            about = [key]
            try:
                committed = [name for name, kind in self.kinds.items() if kind == "committed"]
                self.client.prepare(key, rng.choice(["", *committed]))
                self.kinds[key] = "active"
                if rng.random() < 0.5:
                    about = [key, f"{key}-c"]
                    self.client.commit(f"{key}-c", key)
                    del self.kinds[key]
                    self.kinds[f"{key}-c"] = "committed"
                elif rng.random() < 0.5:
                    self.client.remove(key)
                    del self.kinds[key]
            except grpc.RpcError:
                for name in about:
                    self.kinds.pop(name, None)
                return

    def judge(self) -> None:
        for name, kind in self.kinds.items():
            assert self.client.stat(name).name == name
            if kind == "active":
                upper = self.client.mounts(name)
                assert upper == self.client.mounts(name) and upper
            self.client.usage(name)


def test_kills_in_a_storm_below_containerd(ours: Snapshotter):
    """What containerd promised is there after each kill, and its garbage collection leaves
    nothing in the end: neither rows that containerd never heard of, nor directories."""
    rng = random.Random(11)
    with running_containerd(release("1.6"), snapshotter=ours.socket) as containerd:
        client = SnapshotsClient(containerd.socket, NAME, namespace="storm")
        accounts = [Account(f"client{n}", client, {}) for n in range(3)]
        for _ in range(5):
            end = threading.Event()
            with ThreadPoolExecutor(len(accounts)) as threads:
                done = [
                    threads.submit(account.run, end, random.Random(rng.random()))
                    for account in accounts
                ]
                time.sleep(rng.uniform(0.1, 0.6))
                ours.kill()
                end.set()
                for one in done:
                    one.result(60)
            ours.start()
            eventually(lambda: _reaches(client))
            for account in accounts:
                account.judge()
            assert check_root(ours.root).problems == ()
        assert sum(len(account.kinds) for account in accounts) > 20
        for _ in range(5):
            # containerd forgets to collect when we were away meanwhile: a removal reminds it
            _remove_everything(client, accounts)
            assert _reaches(client)
            with contextlib.suppress(AssertionError):
                eventually(lambda: ours.rows() == [] and ours.files() == [], 10)
                break
        assert (ours.rows(), ours.files()) == ([], [])
        client.close()


def _reaches(client: SnapshotsClient) -> bool:
    """Whether containerd has connected again, which it tries every few seconds."""
    name = f"probe-{fresh_id()}"
    try:
        client.prepare(name)
        client.remove(name)
    except grpc.RpcError:
        return False
    return True


def _remove_everything(client: SnapshotsClient, accounts: list[Account]) -> None:
    """Children, which are newer, first. containerd does not list what it has no row of ours for,
    such as a snapshot whose Commit was done and never answered; but it knows it by its name."""
    names = [
        f"{account.name}-{number}{suffix}"
        for account in accounts
        for number in range(account.number, 0, -1)
        for suffix in ("-c", "")
    ]
    for name in [*names, *(i.name for i in client.list() if i.name.startswith("probe-"))]:
        try:
            client.remove(name)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND, (name, error)
