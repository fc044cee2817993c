"""Remote snapshots: claimed, stacked upon, materialised, shared, released."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.digest import Digest
from imgsnap.errors import AlreadyExists, Unavailable, Unsupported
from imgsnap.snapshotter.labels import TARGET
from imgsnap.snapshotter.report import check_root
from imgsnap.snapshotter.rows import Row
from imgsnap.snapshotter.seams import ImageSnapshot
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
