"""Conversion on first use: what is converted, how often, and what becomes of failures."""

import threading
from dataclasses import dataclass, field

import pytest

from imgsnap.digest import Digest, sha256_digest
from imgsnap.errors import ImgsnapError, Unavailable
from imgsnap.oci.reference import RegistryLocation
from imgsnap.snapshotter import labels as names
from imgsnap.snapshotter.claims import Claims
from imgsnap.snapshotter.counters import Counters
from imgsnap.snapshotter.first_use import FirstUse, FirstUseLimits
from imgsnap.snapshotter.image_labels import repository_name
from imgsnap.snapshotter.parts import matches
from imgsnap.snapshotter.seams import ImageSnapshot
from imgsnap.snapshotter.snapshots import Snapshots
from tests.support.node import wait_for
from tests.support.remote_parts import image_of
from tests.unit.snapshotter.conftest import APP, Core
from tests.unit.snapshotter.test_claims import pull

MANIFEST = sha256_digest(b"manifest")


def labels(name: str = "registry.example/app:1", manifest: str = MANIFEST) -> dict[str, str]:
    return {names.IMAGE_REF: name, names.MANIFEST_DIGEST: manifest}


@dataclass
class Registry:
    """Images and their snapshots; ConvertImage and LookUp."""

    fails: Exception | None = None
    holds: threading.Event | None = None  # a conversion waits for it
    converted: list[str] = field(default_factory=list)
    snapshots: set[str] = field(default_factory=set)
    stopped: bool = False
    hidden: bool = False  # what was published is not listed

    def look_up(self, image: RegistryLocation, manifest: Digest) -> ImageSnapshot | None:
        return image_of("app") if repository_name(image) in self.snapshots else None

    def convert(self, image: RegistryLocation, manifest: Digest) -> None:
        if self.holds is not None:
            assert self.holds.wait(20)
        if self.stopped:
            raise ImgsnapError("stopped")
        self.converted.append(repository_name(image))
        if self.fails is not None:
            raise self.fails
        if not self.hidden:
            self.snapshots.add(repository_name(image))

    def stop(self) -> None:
        self.stopped = True
        if self.holds is not None:
            self.holds.set()


@dataclass
class Setting:
    registry: Registry
    counters: Counters
    first_use: FirstUse
    now: list[float]

    def use(self, name: str = "registry.example/app:1") -> None:
        self.first_use.used(labels(name))

    def results(self) -> dict[str, float]:
        return {s.labels["result"]: s.value for s in self.counters.samples()}

    def settle(self) -> None:
        wait_for(lambda: self.first_use.waiting() == 0, "the end of all conversions")


@pytest.fixture
def setting():
    registry, counters, now = Registry(), Counters(), [0.0]
    limits = FirstUseLimits(delay_s=0, waiting_max=2)
    first_use = FirstUse(
        lambda location: matches(["registry.example/*"], location),
        registry.look_up,
        registry,
        counters,
        limits,
        clock=lambda: now[0],
    )
    first_use.start()
    yield Setting(registry, counters, first_use, now)
    first_use.close()


def test_an_image_is_converted_once(setting: Setting):
    for _ in range(3):
        setting.use()
        setting.settle()
    assert setting.registry.converted == ["registry.example/app"]
    setting.now[0] = 90_000
    setting.use()
    setting.settle()
    assert setting.results() == {"converted": 1, "found": 1}


@pytest.mark.parametrize(
    ("error", "before", "after"),
    [(Unavailable("away"), 299, 301), (ImgsnapError("no"), 3599, 3601), (ValueError(), 3599, 3601)],
)
def test_a_failure_is_tried_again_later(setting: Setting, error, before: float, after: float):
    setting.registry.fails = error
    for now in (0, before):
        setting.now[0] = now
        setting.use()
        setting.settle()
        assert setting.results() == {"failed": 1}
    setting.registry.fails = None
    setting.now[0] = after
    setting.use()
    setting.settle()
    assert setting.results() == {"failed": 1, "converted": 1}


def test_one_that_is_not_found_afterwards_is_a_failure(setting: Setting):
    setting.registry.hidden = True
    setting.use()
    setting.settle()
    assert setting.results() == {"failed": 1}


@pytest.mark.parametrize(
    "found",
    [
        labels("other.example/app:1"),
        labels("../etc/passwd"),
        labels(manifest="sha256:short"),
        {},
        {names.IMAGE_REF: "registry.example/app:1"},
        {names.MANIFEST_DIGEST: MANIFEST},
    ],
)
def test_what_is_left_alone(setting: Setting, found: dict[str, str]):
    setting.first_use.used(found)
    assert setting.first_use.waiting() == 0


def test_the_queue_has_an_end_and_is_forgotten(setting: Setting):
    setting.registry.holds = threading.Event()
    for number in range(5):
        setting.use(f"registry.example/app{number}:1")
    assert setting.first_use.waiting() == 2
    assert setting.results() == {"queue_full": 3}
    setting.first_use.close()
    assert setting.registry.converted == []


def test_only_containers_of_ordinary_images_are_uses(core: Core):
    heard: list[dict[str, str]] = []
    claims = Claims(core.ledger, core.directories, core.images, core.devices, core.layers)
    snapshots = Snapshots(core.ledger, core.directories, claims, on_use=heard.append)
    core.snapshots = snapshots
    top = pull(core, APP)[-1].name
    snapshots.prepare("container", top, {})
    snapshots.prepare("extract-1 sha256:ab", "", labels())
    snapshots.commit("base", "extract-1 sha256:ab", labels())
    snapshots.prepare("k8s.io/5/extract-2 sha256:cd", "base", {})
    snapshots.view("view", "base", {})
    snapshots.prepare("layer", "base", {names.TARGET: MANIFEST})
    snapshots.prepare("scratch", "", {})
    assert heard == []
    snapshots.prepare("ordinary", "base", {})
    assert heard == [labels()]
