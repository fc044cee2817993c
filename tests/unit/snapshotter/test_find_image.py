"""Which snapshot an image has: every way to it, every lie about it, and every registry's mood."""

import json
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.digest import Digest, sha256_digest
from imgsnap.formats.stub_layer import stub_layer
from imgsnap.oci.layout import LayoutRepository
from imgsnap.oci.manifest import ImageIndex, parse_manifest, raw_manifest
from imgsnap.oci.published import NO_PLATFORM, SOURCE, Form
from imgsnap.snapshotter import labels as names
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.find_image import Finder, SearchLimits
from imgsnap.snapshotter.image_labels import registry_location
from imgsnap.snapshotter.registry_search import CANDIDATES_MAX
from imgsnap.snapshotter.seams import ImageSnapshot
from tests.support.converted import Place, labels_of
from tests.support.tars import Item, layer_tar

REPOSITORY = "registry.test/team/app"
BASE = layer_tar([Item(b"base", content=b"base")])
TOP = layer_tar([Item(b"top", content=b"top")])
OTHER = layer_tar([Item(b"other", content=b"other")])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, place: Place, clock: Clock):
    """A finder as after a restart of the process."""

    def finder(*, trusts=lambda location: True, **limits: float) -> Finder:
        return Finder(
            place.open,
            trusts,
            Catalogue(tmp_path / "catalogue"),
            NodeCache(tmp_path / "cache"),
            SearchLimits(**{"look_up_s": 60.0, **limits}),
            clock=clock,
        )

    return finder


# Ordinary images ---------------------------------------------------------------------------------


def test_a_referrer_is_found_by_any_layer_with_one_look_up(place: Place, make, tmp_path):
    place.add_image(BASE, TOP)
    snapshot = place.convert()
    image, finder = place.image(), make()
    found = finder.find(labels_of(image, 1))
    assert (found.repository, found.digest) == (REPOSITORY, snapshot)
    assert [layer.chain_id for layer in found.layers] == image.chain_ids
    assert [layer.diff_id for layer in found.layers] == [sha256_digest(BASE), sha256_digest(TOP)]
    descriptors = [layer.descriptor for layer in image.layers]
    assert [(i.digest, i.size, i.media_type) for i in found.layers] == [
        (d.digest, d.size, d.media_type) for d in descriptors
    ]
    assert finder.find(labels_of(image, 0)) == found and len(place.opened) == 1
    place.away = True
    assert make().find(labels_of(image, 0)) == found, "known after a restart, without a registry"
    # Opening it then costs no manifest and no config: the search has left them in the cache.
    assert NodeCache(tmp_path / "cache").load_blob(snapshot)


def test_an_index_sibling_is_found(place: Place, make):
    place.add_image(BASE)
    snapshot = place.convert()
    image = place.image()
    with closing(LayoutRepository(place.layout)) as layout:
        raw = layout.manifest(snapshot)
    document = replace(parse_manifest(raw.raw), subject=None)  # no referrer then
    place.delete(snapshot)
    alone = raw_manifest(document)
    place.put(alone, "alone")
    marks = {SOURCE: str(image.manifest.descriptor.digest)}
    sibling = replace(alone.descriptor, artifact_type="", platform=NO_PLATFORM, annotations=marks)
    place.put(raw_manifest(ImageIndex((image.manifest.descriptor, sibling))), "both")
    labels = labels_of(image, ref=f"{REPOSITORY}:both")
    assert make().find(labels).digest == alone.descriptor.digest
    # Nothing leads there from the image alone.
    by_digest = f"{REPOSITORY}@{image.manifest.descriptor.digest}"
    assert make().find(labels_of(image, ref=f"{REPOSITORY}:latest")) is not None, "catalogue"
    assert make().find({**labels, names.IMAGE_REF: by_digest.replace("app", "elsewhere")}) is None


def test_an_image_without_a_snapshot_is_asked_for_once_a_while(place: Place, make, clock: Clock):
    place.add_image(BASE)
    finder, labels = make(none_ttl_s=100), labels_of(place.image())
    assert [finder.find(labels) for _ in range(5)] == [None] * 5 and len(place.opened) == 1
    # Another repository is another question.
    finder.find(labels | {names.IMAGE_REF: "registry.test/other:1"})
    assert len(place.opened) == 2
    snapshot = place.convert()
    assert finder.find(labels) is None
    clock.now = 100.5
    assert finder.find(labels).digest == snapshot


def test_a_registry_that_is_away_is_asked_again_soon(place: Place, make, clock: Clock, caplog):
    place.add_image(BASE)
    snapshot = place.convert()
    finder, labels = make(unavailable_ttl_s=5), labels_of(place.image())
    place.away = True
    assert finder.find(labels) is None and finder.find(labels) is None and len(place.opened) == 1
    assert "no answer" in caplog.text
    place.away = False
    clock.now = 5.5
    assert finder.find(labels).digest == snapshot


def test_a_registry_that_hangs_holds_nobody_and_its_late_answer_counts(place: Place, make):
    place.add_image(BASE)
    snapshot = place.convert()
    finder, labels = make(look_up_s=0.05), labels_of(place.image())
    place.answers.clear()
    assert finder.find(labels) is None
    assert finder.find(labels) is None and len(place.opened) == 1, "no second wait"
    place.answers.set()
    done = threading.Event()
    for _ in range(2000):
        if finder.find(labels) is not None:
            break
        done.wait(0.01)
    assert finder.find(labels).digest == snapshot and len(place.opened) == 1


def test_all_who_ask_at_once_share_one_look_up(place: Place, make):
    place.add_image(BASE, TOP)
    snapshot = place.convert()
    finder, image = make(), place.image()
    place.answers.clear()
    found: list[ImageSnapshot | None] = []
    threads = [
        threading.Thread(target=lambda n=n: found.append(finder.find(labels_of(image, n % 2))))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    place.answers.set()
    for thread in threads:
        thread.join()
    assert {item.digest for item in found} == {snapshot} and len(found) == 8
    assert len(place.opened) == 1


# Lies --------------------------------------------------------------------------------------------


def attach(place: Place, snapshot: Digest, to: Digest, tag: str, created: str) -> Digest:
    """Somebody pushes another image's snapshot as a referrer of this one."""
    with closing(LayoutRepository(place.layout)) as layout:
        document = parse_manifest(layout.manifest(snapshot).raw)
        subject = replace(document.subject, digest=to)
        annotations = {"org.opencontainers.image.created": created}
        manifest = raw_manifest(replace(document, subject=subject, annotations=annotations))
        layout.put_manifest(manifest, [tag], subject=to)
    return manifest.descriptor.digest


def test_another_images_snapshot_is_refused_and_the_right_one_taken(place: Place, make, caplog):
    place.add_image(BASE, TOP)
    place.add_image(BASE, OTHER, tag="other")
    image, other = place.image(), place.convert("other")
    digest = image.manifest.descriptor.digest
    lie = attach(place, other, digest, "lie", "2030-01-01T00:00:00Z")
    assert make().find(labels_of(image)) is None
    assert lie in caplog.text and "layers of another image" in caplog.text
    right = place.convert()
    found = make().find(labels_of(image))
    assert found.digest == right
    for number in range(CANDIDATES_MAX):
        attach(place, other, digest, f"lie-{number}", f"2030-01-0{number + 1}T00:00:00Z")
    assert make().find(labels_of(image, ref="registry.test/many:1")) is None, "a bounded search"


def test_a_snapshot_in_one_repository_says_nothing_about_another(place: Place, make):
    """Else who may push anywhere could offer a snapshot for everybody's image."""
    place.add_image(BASE)
    place.convert()
    labels = labels_of(place.image())
    assert make().find(labels | {names.IMAGE_REF: "evil.test/app:1"}).repository == "evil.test/app"
    assert make().find(labels).repository == REPOSITORY
    assert [location.registry for location in place.opened] == ["evil.test", "registry.test"]


def test_only_trusted_repositories_are_asked(place: Place, make):
    place.add_image(BASE)
    snapshot = place.convert()
    labels = labels_of(place.image())
    assert make(trusts=lambda location: False).find(labels) is None and not place.opened
    finder = make(trusts=lambda location: location.repository == "team/app")
    assert finder.find(labels).digest == snapshot
    assert make(trusts=lambda location: False).find(labels) is None, "nor remembered ones"


def test_a_layer_that_is_not_the_images_is_refused(place: Place, make, caplog):
    place.add_image(BASE, TOP)
    place.convert()
    finder, image = make(), place.image()
    wrong = "sha256:" + "1" * 64
    for change in (
        {names.LAYER_DIGEST: wrong},
        {names.TARGET: wrong},
        {names.TARGET: image.chain_ids[1]},
    ):
        caplog.clear()
        assert finder.find(labels_of(image, 0) | change) is None
        assert "the image has no layer" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {names.IMAGE_REF: "../../etc/passwd"},
        {names.IMAGE_REF: "oci:/var/lib/registry:tag"},
        {names.IMAGE_REF: "store:app"},
        {names.IMAGE_REF: "docker://registry.test/team/app"},
        {names.IMAGE_REF: "registry.test/team/app\n"},
        {names.IMAGE_REF: "registry.test/" + "a" * 5000},
        {names.IMAGE_REF: "registry.test/ünï"},
        {names.IMAGE_REF: "\udc80"},
        {names.IMAGE_REF: ""},
        {names.MANIFEST_DIGEST: "latest"},
        {names.MANIFEST_DIGEST: "sha256:" + "A" * 64},
        {names.MANIFEST_DIGEST: "sha512:" + "a" * 128},
        {names.LAYER_DIGEST: "/var/lib/x"},
        {names.TARGET: "sha256:../../x"},
        {names.SNAPSHOT_DIGEST: "/dev/sda"},
        {names.SNAPSHOT_DIGEST: ""},
        {names.SNAPSHOT_DIGEST: "sha256:" + "a" * 64},
    ],
)
def test_hostile_labels_are_refused_and_logged(place: Place, make, change, caplog):
    place.add_image(BASE)
    place.convert()
    assert make().find(labels_of(place.image()) | change) is None
    assert "pulled as any other image" in caplog.text and not place.opened
    assert "\n" not in caplog.records[-1].getMessage() and "Traceback" not in caplog.text


def test_missing_labels_are_no_image_of_ours(place: Place, make, caplog):
    assert make().find({}) is None
    assert make().find({names.TARGET: "sha256:" + "0" * 64}) is None
    labels = {names.IMAGE_REF: "registry.test/a:1"}
    assert make().find(labels) is None and caplog.text == ""


def test_broken_documents_are_refused(place: Place, make, caplog):
    place.add_image(BASE)
    snapshot = place.convert()
    image = place.image()
    with closing(LayoutRepository(place.layout)) as layout:
        config = parse_manifest(layout.manifest(snapshot).raw).config
    blob = place.layout / "blobs/sha256" / config.digest[7:]
    blob.chmod(0o644)
    blob.write_bytes(b"x" * config.size)
    assert make().find(labels_of(image)) is None
    assert str(snapshot) in caplog.text and "Traceback" not in caplog.text


def test_an_index_in_place_of_a_manifest_is_refused(place: Place, make):
    place.add_image(BASE)
    place.convert()
    image = place.image()
    index = raw_manifest(ImageIndex((image.manifest.descriptor,)))
    place.put(index, "index")
    labels = labels_of(image) | {names.MANIFEST_DIGEST: index.descriptor.digest}
    attach(place, place.convert("index"), index.descriptor.digest, "x", "2030-01-01T00:00:00Z")
    assert make().find(labels) is None


# Converted images --------------------------------------------------------------------------------


def stub_labels(snapshot: Digest, **changes: str) -> dict[str, str]:
    return {names.TARGET: stub_layer(snapshot).diff_id, names.SNAPSHOT_DIGEST: snapshot, **changes}


def test_a_converted_image_needs_no_registry(place: Place, make):
    place.add_image(BASE, TOP)
    snapshot = place.convert(form=Form.IMAGE)
    labels = stub_labels(snapshot) | {names.IMAGE_REF: f"{REPOSITORY}:latest-snap"}
    found = make().find(labels)
    assert (found.repository, found.digest) == (REPOSITORY, snapshot) and not place.opened
    (layer,) = found.layers
    assert layer.chain_id == layer.diff_id == stub_layer(snapshot).diff_id
    with closing(LayoutRepository(place.layout)) as layout:
        index = json.loads(layout.manifest("latest-snap").raw)
        published = parse_manifest(layout.manifest(index["manifests"][0]["digest"]).raw)
        assert published.layers[0].digest == layer.digest
        assert published.layers[0].size == layer.size
        assert published.layers[0].media_type == layer.media_type
        assert layout.blob(published.layers[0], size_max=1 << 20) == stub_layer(snapshot).blob


def test_the_annotation_on_another_layer_is_refused(place: Place, make, caplog):
    """An author cannot make a base image's chainID stand for a snapshot of his choice."""
    place.add_image(BASE)
    snapshot = place.convert()
    labels = labels_of(place.image()) | {names.SNAPSHOT_DIGEST: snapshot}
    assert make().find(labels) is None and "is not its stub" in caplog.text
    assert make().find({names.SNAPSHOT_DIGEST: snapshot}) is None


def test_a_client_that_names_no_image_gets_what_was_opened_before(make, caplog):
    snapshot = Digest("sha256:" + "7" * 64)
    finder = make()
    assert finder.find(stub_labels(snapshot)) is None and "which repository" in caplog.text
    found = finder.find(stub_labels(snapshot) | {names.IMAGE_REF: f"{REPOSITORY}:x"})
    assert finder.find(stub_labels(snapshot)) is None, "a label alone proves nothing"
    finder.opened(found)
    assert make().find(stub_labels(snapshot)) == found


def test_what_is_gone_is_not_given_again(place: Place, make, clock: Clock):
    place.add_image(BASE)
    finder, labels = make(none_ttl_s=100), labels_of(place.image())
    first = place.convert()
    assert finder.find(labels).digest == first
    place.delete(first)
    finder.gone(labels)
    finder.gone({names.TARGET: "x"})
    assert finder.find(labels) is None and len(place.opened) == 1
    place.add_image(BASE, tag="again", compression="zstd")
    clock.now = 101
    assert finder.find(labels) is None and len(place.opened) == 2
    place.convert()
    clock.now = 202
    assert finder.find(labels) is not None


# What others know --------------------------------------------------------------------------------


def test_what_is_remembered_is_found_at_once(place: Place, make):
    place.add_image(BASE)
    image, finder = place.image(), make()
    labels = labels_of(image)
    assert finder.find(labels) is None
    snapshot = place.convert()
    elsewhere = make().find(labels)
    assert elsewhere.digest == snapshot
    finder.remember(registry_location(REPOSITORY), image.manifest.descriptor.digest, elsewhere)
    assert finder.find(labels) == elsewhere


def test_a_full_disk_costs_look_ups_only(place: Place, make, monkeypatch, caplog):
    place.add_image(BASE)
    snapshot = place.convert()
    finder, labels = make(), labels_of(place.image())

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Catalogue, "store", full)
    assert finder.find(labels).digest == finder.find(labels).digest == snapshot
    assert len(place.opened) == 2 and "No space left" in caplog.text
