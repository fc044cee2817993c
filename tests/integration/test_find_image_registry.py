"""The finder against a real registry (tag schema, no referrers API): what is asked, what is not."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from imgsnap.blockstore.node_cache import NodeCache
from imgsnap.blockstore.snapshot import open_snapshot
from imgsnap.convert.limits import Limits
from imgsnap.convert.source import SourceImage, select_images
from imgsnap.oci.locate import RegistryOptions, open_repository
from imgsnap.oci.reference import RegistryLocation
from imgsnap.oci.repository import Repository
from imgsnap.snapshotter import labels as names
from imgsnap.snapshotter.catalogue import Catalogue
from imgsnap.snapshotter.find_image import Finder, SearchLimits
from imgsnap.snapshotter.image_labels import registry_location
from imgsnap.snapshotter.unpack_layer import Unpacker
from tests.support.cli import Cli
from tests.support.converted import labels_of
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image
from tests.support.samples import base_tar, top_tar

pytestmark = pytest.mark.registry
HTTP = "--plain-http"


def opened(location: RegistryLocation) -> Repository:
    options = RegistryOptions(plain_http=True, connect_timeout_s=2, read_timeout_s=5)
    repository, _ = open_repository(location, options, store=Path("/nonexistent"), environ={})
    return repository


def source_of(reference: str) -> SourceImage:
    location = registry_location(reference)
    with closing(opened(location)) as repository:
        (found,) = select_images(repository, location.reference, [], Limits())
    return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], Finder]:
    def finder() -> Finder:
        catalogue = Catalogue(tmp_path / "catalogue")
        limits = SearchLimits(look_up_s=60)
        return Finder(opened, lambda _: True, catalogue, NodeCache(tmp_path / "cache"), limits)

    return finder


def test_a_converted_repository(
    cli: Cli, registry: DockerRegistry, name: str, make, tmp_path: Path
):
    remote = registry.put(name, collect(image(base_tar(), top_tar()), "1.0"))
    digest = "sha256:" + cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    source = source_of(remote)
    registry.accesses()
    finder = make()
    found = finder.find(labels_of(source, 1, remote))
    assert (found.repository, found.digest) == (f"{registry.address}/{name}", digest)
    log = registry.accesses()
    blobs = [layer.descriptor.digest for layer in source.layers]
    assert not [a for a in log if any(blob in a.path for blob in blobs)], "no layer is fetched"
    assert len([a for a in log if a.status == 200]) <= 6
    assert finder.find(labels_of(source, 0, remote)) == found and registry.accesses() == []

    with closing(opened(registry_location(remote))) as repository:
        open_snapshot(repository, digest, NodeCache(tmp_path / "cache")).close()
    log = registry.accesses()
    assert not [a for a in log if "/manifests/" in a.path], "the finder left it in the cache"


def test_an_unconverted_one_costs_three_requests_once(registry: DockerRegistry, name: str, make):
    remote = registry.put(name, collect(image(base_tar(), top_tar()), "1.0"))
    source = source_of(remote)
    registry.accesses()
    finder = make()
    assert finder.find(labels_of(source, 0, remote)) is None
    # The referrers API and the tag that stands for it, at once; the tag that was pulled.
    assert len(registry.accesses()) == 3
    assert finder.find(labels_of(source, 1, remote)) is None and registry.accesses() == []


def test_a_registry_that_is_gone(own_registry: DockerRegistry, cli: Cli, make, caplog):
    remote = own_registry.put("app", collect(image(base_tar()), "1.0"))
    cli.convert(remote, f"{own_registry.address}/app:snap", HTTP)
    source = source_of(remote)
    own_registry.stop()
    assert make().find(labels_of(source, 0, remote)) is None
    assert "pulled as any other image" in caplog.text and "Traceback" not in caplog.text
    own_registry.start()
    found = make().find(labels_of(source, 0, remote))
    own_registry.stop()
    assert found is not None and make().find(labels_of(source, 0, remote)) == found


def test_a_converted_image_as_cri_pulls_it(
    cli: Cli, registry: DockerRegistry, name: str, make, tmp_path: Path
):
    remote = registry.put(name, collect(image(base_tar(), top_tar()), "1.0"))
    fast = f"{registry.address}/{name}:1.0-fast"
    cli.convert(remote, fast, HTTP, "--as", "image")
    index = json.loads(cli.bytes_of("inspect", HTTP, "--raw", fast))
    repository = f"{registry.address}/{name}"
    digest = index["manifests"][0]["digest"]
    manifest = json.loads(cli.bytes_of("inspect", HTTP, "--raw", f"{repository}@{digest}"))
    with closing(opened(registry_location(remote))) as place:
        config = json.loads(place.blob(_descriptor(manifest["config"]), size_max=1 << 20))
    (diff_id,) = config["rootfs"]["diff_ids"]
    (layer,) = manifest["layers"]
    registry.accesses()
    found = make().find(
        {
            names.TARGET: diff_id,
            **layer["annotations"],
            names.IMAGE_REF: fast,
            names.MANIFEST_DIGEST: digest,
            names.LAYER_DIGEST: layer["digest"],
        }
    )
    assert found.digest == index["manifests"][1]["digest"] and registry.accesses() == []
    assert [item.digest for item in found.layers] == [layer["digest"]]


def _descriptor(value: dict):
    from imgsnap.oci.manifest import parse_descriptor

    return parse_descriptor(value, record="test")


@pytest.mark.root
def test_a_layer_of_a_found_image_is_unpacked(
    cli: Cli, registry: DockerRegistry, name: str, make, tmp_path: Path
):
    remote = registry.put(name, collect(image(base_tar(), top_tar()), "1.0"))
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    found = make().find(labels_of(source_of(remote), 0, remote))
    (tmp_path / "fs").mkdir()
    registry.accesses()
    Unpacker(opened, tmp_path / "work").unpack(
        found.repository, found.layers[0], tmp_path / "fs", []
    )
    assert (tmp_path / "fs/etc/hosts").read_text() == "127.0.0.1 localhost\n"
    (got,) = [a for a in registry.accesses() if a.method == "GET" and a.status == 200]
    assert found.layers[0].digest in got.path
