"""Remote snapshots: claimed, stacked upon, materialised, shared, released."""

import contextlib
import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.digest import Digest
from imgsnap.errors import (
    AlreadyExists,
    Busy,
    ImgsnapError,
    NotFound,
    Unavailable,
    Unsupported,
)
from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.labels import TARGET
from imgsnap.snapshotter.mount_forms import Mount, MountForm
from imgsnap.snapshotter.report import check_root
from imgsnap.snapshotter.rows import Row, WrongState
from imgsnap.snapshotter.seams import ImageSnapshot
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support.remote_parts import image_of, labels_of, layer_file
from tests.unit.snapshotter.conftest import APP, Core

OTHER = image_of("base", "other")  # its base is APP's


def asked(core: Core, key: str, parent: str, labels: dict[str, str]) -> Row | None:
    """What a client of containerd does with a layer: the claimed row, or None when it has to fetch.

    As containerd's metadata.Snapshotter.createSnapshot: the first committed row with that label
    on that parent.
    """
    try:
        core.snapshots.prepare(key, parent, labels)
    except AlreadyExists:
        target = labels[TARGET]
        found = core.snapshots.list(
            [f'labels."containerd.io/snapshot.ref"=={target},parent=="{parent}"']
        )
        assert found[0].kind.name == "COMMITTED" and found[0].parent == parent
        assert found[0].labels[TARGET] == target
        return found[0]
    return None


def pull(core: Core, image: ImageSnapshot, namespace: str = "n/1") -> list[Row]:
    """Every layer claimed or, as an ordinary one, extracted and committed."""
    rows: list[Row] = []
    for index, layer in enumerate(image.layers):
        parent = rows[-1].name if rows else ""
        key = f"{namespace}/extract-{layer.chain_id}"
        row = asked(core, key, parent, labels_of(image, index))
        if row is None:
            tree = core.directories.fs(core.snapshots.stat(key).id)
            (tree / layer_file(layer)).write_text("ordinary")
            name = f"{namespace}/{layer.chain_id}"
            core.snapshots.commit(name, key, {TARGET: layer.chain_id})
            row = core.snapshots.stat(name)
        rows.append(row)
    return rows


def lowers(core: Core, key: str) -> list[str]:
    """The directories beneath a snapshot, from the top: device, or the layer's file."""
    row = core.snapshots.stat(key)
    names = []
    for mount in core.snapshots.mounts(key):
        for option in mount.options:
            if option.startswith("lowerdir="):
                for path in option.partition("=")[2].split(":"):
                    names.append(next(child.name for child in Path(path).iterdir()))
    assert row.parent
    return names


def with_form(core: Core, form: MountForm) -> Core:
    claims = Claims(core.ledger, core.directories, core.images, core.devices, core.layers)
    return replace(core, snapshots=Snapshots(core.ledger, core.directories, claims, form))


def states(rows: list[Row]) -> list[str]:
    return [row.state for row in rows]


def files(image: ImageSnapshot) -> list[str]:
    return [layer_file(layer) for layer in reversed(image.layers)]


def test_a_converted_image_is_claimed_and_not_fetched(core: Core):
    rows = pull(core, APP)
    assert states(rows) == ["placeholder", "placeholder", "device"]
    core.snapshots.prepare("n/2/container", rows[-1].name, {})
    assert lowers(core, "n/2/container") == ["device"]
    assert core.layers.unpacked == []
    assert core.snapshots.usage(rows[0].name).inodes == 0
    assert core.snapshots.stat(rows[-1].name).device == APP.digest


def test_the_device_is_shown_again_after_a_restart(core: Core):
    rows = pull(core, APP)
    core.snapshots.prepare("n/2/container", rows[-1].name, {})
    core.devices.release(APP.digest)
    core.snapshots.recover()
    assert core.snapshots.mounts("n/2/container")[0].options[-1].endswith(APP.digest[7:])
    assert lowers(core, "n/2/container") == ["device"]


def test_an_unconverted_image_on_a_claimed_base(core: Core):
    """containerd does not ask for the base again: it has that chainID."""
    base = pull(core, APP)[0]
    layer = OTHER.layers[1]
    labels = {**labels_of(OTHER, 1)}
    assert asked(core, "n/3/extract", base.name, labels) is None
    (core.directories.fs(core.snapshots.stat("n/3/extract").id) / layer_file(layer)).write_text("x")
    core.snapshots.commit("n/3/other", "n/3/extract", {})
    assert core.layers.unpacked == [OTHER.layers[0].digest]
    core.snapshots.prepare("n/4/container", "n/3/other", {})
    assert lowers(core, "n/4/container") == files(OTHER)
    assert core.layers.unpacked == [OTHER.layers[0].digest]
    assert core.snapshots.stat(base.name).state == "layer"
    # and the converted one still runs from its device
    core.snapshots.prepare("n/5/container", pull(core, APP)[-1].name, {})
    assert lowers(core, "n/5/container") == ["device"]


def test_a_converted_image_on_an_ordinary_base(core: Core):
    base = pull(core, OTHER)[0]
    assert states([base]) == ["layer"]
    row = asked(core, "n/6/x", base.name, labels_of(APP, 1))
    assert row is not None
    top = asked(core, "n/6/y", row.name, labels_of(APP, 2))
    assert top is not None and top.state == "device"
    core.snapshots.prepare("n/6/container", top.name, {})
    assert lowers(core, "n/6/container") == ["device"]


def test_an_unconverted_image_does_not_take_a_placeholder(core: Core):
    """In another namespace, where containerd does not know the chainID, it is fetched as ever."""
    pull(core, APP, "n/1")
    assert states(pull(core, OTHER, "m/1")) == ["layer", "layer"]
    assert core.layers.unpacked == []


def test_two_namespaces(core: Core):
    """The second one has the base as an ordinary row: a row of its own for the same chainID."""
    first = pull(core, APP, "a/1")
    assert pull(core, APP, "b/1") == first
    ordinary = pull(core, OTHER, "c/1")[0]
    row = asked(core, "c/2/x", ordinary.name, labels_of(APP, 1))
    assert row is not None and row.id != first[1].id and row.target == first[1].target


def test_the_base_of_one_image_is_the_top_of_another(core: Core):
    """The placeholder becomes a device when the image whose top it is arrives."""
    base = image_of("base")
    core.images.images = [APP, base]
    assert states(pull(core, APP)) == ["placeholder", "placeholder", "device"]
    row = pull(core, base, "m/1")[0]
    assert row.state == "device" and row.device == base.digest
    core.snapshots.prepare("m/2/container", row.name, {})
    assert lowers(core, "m/2/container") == ["device"]
    assert states(pull(core, APP, "o/1")) == ["device", "placeholder", "device"]


def test_a_device_that_cannot_be_had_means_an_ordinary_pull(core: Core):
    core.devices.missing = {APP.digest}
    assert states(pull(core, APP)) == ["layer"] * 3
    assert list(core.devices.shown()) == []
    assert core.images.lost == [], "a registry that does not answer says nothing"


def test_a_snapshot_that_is_gone_is_not_to_be_given_again(core: Core):
    core.devices.deleted = {APP.digest}
    assert states(pull(core, APP)) == ["layer"] * 3
    assert core.images.lost[0] == APP.layers[0].chain_id and core.images.seen == []


def test_where_a_snapshot_was_opened_is_told(core: Core):
    pull(core, APP)
    assert core.images.seen == [APP.digest] * 3 and core.images.lost == []


def test_a_device_that_goes_away_halfway_still_gives_the_right_bytes(core: Core):
    first = asked(core, "n/1/a", "", labels_of(APP, 0))
    assert first is not None and first.state == "placeholder"
    core.devices.missing = {APP.digest}
    assert asked(core, "n/1/b", first.name, labels_of(APP, 1)) is None
    assert core.layers.unpacked == [APP.layers[0].digest]
    assert lowers(core, "n/1/b") == [layer_file(APP.layers[0])]


def test_a_device_that_is_gone_at_start_is_an_error_with_its_reason(core: Core):
    rows = pull(core, APP)
    core.devices.missing = {APP.digest}
    with pytest.raises(Unavailable, match=r"registry\.example/app does not answer"):
        core.snapshots.prepare("n/2/container", rows[-1].name, {})
    assert [row.name for row in core.snapshots.list(["kind==active"])] == []
    assert len(list((core.root / "snapshots").iterdir())) == 0


@pytest.mark.parametrize(
    "target", ["", "x", "/etc/passwd", "sha256:" + "0" * 64, OTHER.layers[1].chain_id]
)
def test_a_target_that_is_not_of_the_image_is_an_ordinary_layer(core: Core, target: str):
    labels = {**labels_of(APP, 0), TARGET: target}
    core.snapshots.prepare("n/1/x", "", labels)
    assert core.snapshots.stat("n/1/x").state == "active"


def test_a_layer_on_the_wrong_parent_is_not_claimed(core: Core):
    """As containerd's rebase asks, or whoever wants one image's layer beneath another's."""
    core.snapshots.prepare("n/1/rebased", "", labels_of(APP, 1))
    core.snapshots.prepare("n/1/a", "", {})
    core.snapshots.commit("n/1/sha256:wrong", "n/1/a", {})
    core.snapshots.prepare("n/1/x", "n/1/sha256:wrong", labels_of(APP, 1))
    core.snapshots.prepare("n/1/y", "n/1/sha256:wrong", labels_of(APP, 0))
    assert all(row.claim is None for row in core.snapshots.list([]))


def test_materialising_happens_once(core: Core):
    base = pull(core, APP)[0]
    start = threading.Barrier(8)

    def prepare(number: int) -> None:
        start.wait()
        core.snapshots.prepare(f"n/2/{number}", base.name, {})

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(prepare, range(8)))
    assert core.layers.unpacked == [APP.layers[0].digest]
    assert {tuple(lowers(core, f"n/2/{n}")) for n in range(8)} == {(layer_file(APP.layers[0]),)}


def test_a_placeholder_that_becomes_a_device_while_it_is_unpacked(core: Core):
    base = image_of("base")
    core.images.images = [APP, base]
    row = pull(core, APP)[0]
    unpack = core.layers.unpack

    def slow(*arguments) -> None:
        unpack(*arguments)
        assert pull(core, base, "m/1")[0].device == base.digest

    core.layers.unpack = slow  # type: ignore[method-assign]
    core.snapshots.prepare("n/2/x", row.name, {})
    assert lowers(core, "n/2/x") == ["device"]
    core.snapshots.cleanup()
    assert check_root(core.root).problems == ()


def test_a_layer_that_cannot_be_unpacked_leaves_nothing(core: Core):
    base = pull(core, APP)[0]
    core.layers.fails = Unavailable("registry away")
    with pytest.raises(Unavailable):
        core.snapshots.prepare("n/2/x", base.name, {})
    assert list((core.root / "snapshots").iterdir()) == []
    assert core.snapshots.stat(base.name).state == "placeholder"
    core.layers.fails = None
    core.snapshots.prepare("n/2/x", base.name, {})
    assert lowers(core, "n/2/x") == [layer_file(APP.layers[0])]


def test_commit_and_mounts_never_unpack(core: Core):
    rows = pull(core, APP)
    core.snapshots.prepare("n/2/x", rows[-1].name, {})
    core.snapshots.mounts("n/2/x")
    core.snapshots.commit("n/2/c", "n/2/x", {})
    assert core.layers.unpacked == []


@pytest.mark.parametrize("containers_first", [True, False])
def test_devices_go_when_no_row_needs_them(core: Core, containers_first: bool):
    rows = pull(core, APP)
    core.snapshots.prepare("n/2/x", rows[-1].name, {})
    core.snapshots.cleanup()
    assert list(core.devices.shown()) == [APP.digest]
    core.snapshots.remove("n/2/x")
    for row in reversed(rows):
        core.snapshots.remove(row.name)
    core.devices.busy = {APP.digest}
    core.snapshots.cleanup()
    assert list(core.devices.shown()) == [APP.digest]
    core.devices.busy = set()
    core.snapshots.cleanup()
    assert list(core.devices.shown()) == []
    assert [list((core.root / name).iterdir()) for name in ("snapshots", "removed")] == [[], []]


def test_a_device_is_not_released_while_it_is_being_claimed(core: Core):
    """Cleanup beside a claim: whoever is first, a claimed row's device stays shown."""
    for _ in range(20):
        image = APP
        with ThreadPoolExecutor(2) as threads:
            pulling = threads.submit(pull, core, image)
            while not pulling.done():
                threads.submit(core.snapshots.cleanup).result()
            rows = pulling.result()
        assert list(core.devices.shown()) == [APP.digest]
        for row in reversed(rows):
            core.snapshots.remove(row.name)


def test_cleanup_does_not_wait_for_a_claim(core: Core):
    show = core.devices.show

    def cleans_up(*arguments) -> Path:
        path = show(*arguments)
        with ThreadPoolExecutor(1) as thread:
            thread.submit(core.snapshots.cleanup).result(60)
        return path

    core.devices.show = cleans_up  # type: ignore[method-assign]
    pull(core, APP)
    assert list(core.devices.shown()) == [APP.digest]


def test_without_devices_a_claimed_row_is_an_error(core: Core, root: Path):
    from imgsnap.snapshotter.claims import Claims

    rows = pull(core, APP)
    alone = Claims(core.ledger, core.directories)
    assert alone.claim("", labels_of(APP, 0)) is None
    with pytest.raises(Unsupported):
        alone.lowers(rows[-1].name)
    with pytest.raises(Unsupported):
        alone.lowers(rows[0].name)


def test_a_snapshot_claimed_from_a_label_of_any_digest(core: Core):
    """A finder that answers with an image of another digest than asked: only its layers count."""
    stub = replace(APP, digest=Digest("sha256:" + "1" * 64))
    core.images.images = [stub]
    assert asked(core, "n/1/x", "", labels_of(APP, 0)) is None


def test_a_row_of_the_same_name_gets_nothing_that_was_fetched_for_its_forerunner(core: Core):
    """containerd was restarted while a layer was fetched, removed the row and claimed it again."""
    (row, *_) = pull(core, APP)
    unpack = core.layers.unpack

    def unpack_while_it_is_claimed_again(*arguments) -> None:
        unpack(*arguments)
        for name in [row.name for row in reversed(core.snapshots.list([]))]:
            core.snapshots.remove(name)
        core.layers.unpack = unpack
        (again, *_) = pull(core, APP)
        assert again.name == row.name and again.id != row.id

    core.layers.unpack = unpack_while_it_is_claimed_again
    with pytest.raises(ImgsnapError):
        core.snapshots.prepare("container", row.name, {})
    assert core.snapshots.stat(row.name).state == "placeholder"
    assert not check_root(core.root).problems
    core.snapshots.prepare("container", row.name, {})
    assert lowers(core, "container") == [layer_file(APP.layers[0])]


def test_a_disk_that_takes_no_device_means_the_fallback(core: Core, monkeypatch):
    def full(*arguments) -> Path:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(core.devices, "show", full)
    assert states(pull(core, APP)) == ["layer"] * 3


def test_a_collection_goes_on_when_a_device_cannot_be_released(core: Core, monkeypatch):
    """containerd's stops at the first error of ours."""
    for row in reversed(pull(core, APP)):
        core.snapshots.remove(row.name)

    def stuck(snapshot: Digest) -> None:
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(core.devices, "release", stuck)
    core.snapshots.cleanup()
    assert list(core.devices.shown()) == [APP.digest]
    monkeypatch.undo()
    core.snapshots.cleanup()
    assert not list(core.devices.shown())


# Mount forms ---------------------------------------------------------------------------------


def device_file(core: Core) -> str:
    return str(core.root / "devices" / APP.digest[7:] / "device")


def view_of_erofs(core: Core) -> list[Mount]:
    return [Mount("erofs", device_file(core), ("ro",))]


def test_the_overlay_form_names_no_file(core: Core):
    top = pull(core, APP)[-1].name
    (view,) = core.snapshots.view("view", top, {})
    (container,) = core.snapshots.prepare("container", top, {})
    assert (view.type, container.type) == ("bind", "overlay")


def test_the_erofs_form_gives_views_the_file_and_containers_an_overlay(core: Core):
    core = with_form(core, MountForm.EROFS)
    top = pull(core, APP)[-1].name
    assert core.snapshots.view("view", top, {}) == view_of_erofs(core)
    assert core.snapshots.mounts("view") == view_of_erofs(core)
    (container,) = core.snapshots.prepare("container", top, {})
    assert container.type == "overlay"


def test_the_manager_form_is_a_file_and_an_overlay_on_it(core: Core):
    """Of this form there is only what containerd 2.2's sources say: none could be run here."""
    core = with_form(core, MountForm.MANAGER)
    top = pull(core, APP)[-1].name
    lower, overlay = core.snapshots.prepare("container", top, {})
    assert [lower] == view_of_erofs(core) == core.snapshots.view("view", top, {})
    assert (overlay.type, overlay.source) == ("format/mkdir/overlay", "overlay")
    own = core.root / "snapshots" / str(core.snapshots.stat("container").id)
    options = [option for option in overlay.options if option != "index=off"]
    assert options == [f"workdir={own}/work", f"upperdir={own}/fs", "lowerdir={{ mount 0 }}"]
    assert core.snapshots.mounts("container") == [lower, overlay]


@pytest.mark.parametrize("form", [MountForm.EROFS, MountForm.MANAGER])
def test_what_is_not_one_file_alone_is_an_overlay(core: Core, form: MountForm):
    core = with_form(core, form)
    top = pull(core, APP)[-1].name
    # a layer is extracted by who knows no mount manager; both ways to tell one
    for key, labels in (
        ("k8s.io/7/extract-1 sha256:aa", {}),
        ("x", {TARGET: "sha256:" + "a" * 64}),
    ):
        (extraction,) = core.snapshots.prepare(key, top, labels)
        assert extraction.type == "overlay"
    core.snapshots.commit("on-top", "x", {})
    (stacked,) = core.snapshots.prepare("stacked", "on-top", {})
    (seen,) = core.snapshots.view("seen", "on-top", {})
    (bottom,) = core.snapshots.view("bottom", "", {})
    assert (stacked.type, seen.type, bottom.type) == ("overlay", "overlay", "bind")
    core.devices.split.add(APP.digest)
    (view,) = core.snapshots.view("view", top, {})
    (container,) = core.snapshots.prepare("container", top, {})
    assert (view.type, container.type) == ("bind", "overlay")


def test_a_file_that_cannot_be_had_leaves_no_row(core: Core, monkeypatch):
    core = with_form(core, MountForm.MANAGER)
    top = pull(core, APP)[-1].name

    def away(*arguments) -> Path:
        raise Unavailable("the daemon is away")

    monkeypatch.setattr(core.devices, "file", away)
    with pytest.raises(Unavailable):
        core.snapshots.prepare("container", top, {})
    assert "container" not in [row.name for row in core.snapshots.list([])]


# Races ---------------------------------------------------------------------------------------

_GONE_MEANWHILE = (NotFound, WrongState, Busy, AlreadyExists, IndexError)  # the last is `asked`'s


def test_claims_containers_removals_and_cleanups_at_once(core: Core):
    """Whoever was given a container's mounts has the device beneath it as long as it is there."""
    end, without = threading.Event(), []

    def client(number: int) -> None:
        for turn in range(25):
            key = f"container-{number}-{turn}"
            with contextlib.suppress(*_GONE_MEANWHILE):
                top = pull(core, APP, f"n/{number}-{turn}")[-1].name
                core.snapshots.prepare(key, top, {})
                (mount,) = core.snapshots.mounts(key)
                device = Path(mount.options[-1].partition("=")[2]) / "device"
                if core.snapshots.stat(top).device and not device.exists():
                    without.append(device)
                core.snapshots.remove(key)
            for row in reversed(core.snapshots.list([])):
                with contextlib.suppress(*_GONE_MEANWHILE):
                    core.snapshots.remove(row.name)

    def collect() -> None:
        while not end.is_set():
            core.snapshots.cleanup()

    with ThreadPoolExecutor(4) as pool:
        collecting = pool.submit(collect)
        clients = [pool.submit(client, number) for number in range(3)]
        try:
            for done in clients:
                done.result(120)
        finally:
            end.set()
        collecting.result(20)
    assert without == []
    for row in reversed(core.snapshots.list([])):
        core.snapshots.remove(row.name)
    core.snapshots.cleanup()
    assert not list(core.devices.shown()) and not check_root(core.root).problems
