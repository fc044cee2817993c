"""imgsnap gc: what no tag leads to goes, in layouts and registries, beside a conversion too."""

import threading
import time

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.samples import base_tar, noise, top_tar
from tests.support.tars import Item, layer_tar

HTTP = "--plain-http"


def layer(*numbers: int) -> bytes:
    return layer_tar([Item(b"data/%d" % n, content=noise(200_000, n)) for n in numbers])


def blobs(cli: Cli) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cli.store / "blobs/sha256").iterdir()}


@pytest.fixture
def store(cli: Cli, tmp_path) -> Cli:
    """Two snapshots that share a layer, one with a layer of its own."""
    write_layout(tmp_path / "one", image(base_tar(), layer(1, 2)))
    write_layout(tmp_path / "two", image(base_tar(), layer(2, 3)))
    cli.convert(f"oci:{tmp_path}/one", "store:app:one")
    cli.convert(f"oci:{tmp_path}/two", "store:app:two")
    return cli


def test_nothing_in_use_goes(store: Cli):
    before = blobs(store)
    value = store("gc", "store:any", "--grace", "0", "--format", "json").json
    assert value["deleted"] == [] and value["bytes"] == 0 and value["kept"] >= 5
    assert blobs(store) == before


def test_an_untagged_snapshot_goes_with_what_it_has_alone(store: Cli):
    before = blobs(store)
    keep = ("--keep-tag", "app:two", "--format", "json")
    told = store("gc", "store:any", *keep).json
    assert told["deleted"] == [] and told["waiting"] == 2, "younger than a day"
    told = store("gc", "store:any", *keep, "--grace", "0", "--dry-run").json
    assert blobs(store) == before
    done = store("gc", "store:any", *keep, "--grace", "0").json
    assert done["deleted"] == told["deleted"] and done["bytes"] == told["bytes"] > 0
    assert {item["kind"] for item in done["deleted"]} == {"snapshot", "layer"}
    left = blobs(store)
    assert sum(before.values()) - sum(left.values()) == done["bytes"]
    # Its pack is needed by the snapshot that shares a chunk, or the chunk is nowhere else.
    store("check", "store:app:two")
    store.fails(4, "inspect", "store:app:one")
    again = store("gc", "store:any", *keep, "--grace", "0").json
    assert again["deleted"] == [] and again["blobs"] == 0


def test_a_later_conversion_does_not_trust_what_is_gone(store: Cli, tmp_path):
    """The chunk index knows packs that were deleted."""
    store("gc", "store:any", "--keep-tag", "none", "--grace", "0")
    assert blobs(store) == {}
    store.convert(f"oci:{tmp_path}/two", "store:app:two")
    store("check", "store:app:two", "--source", f"oci:{tmp_path}/two")


def test_what_others_put_into_a_layout_stays(cli: Cli, tmp_path):
    write_layout(tmp_path / "one", image(base_tar(), top_tar()))
    layout = f"oci:{tmp_path}/one"
    before = {path.name for path in (tmp_path / "one/blobs/sha256").iterdir()}
    cli.convert(f"{layout}:latest", f"{layout}:snap")
    cli("gc", layout, "--keep-tag", "none", "--grace", "0")
    after = {path.name for path in (tmp_path / "one/blobs/sha256").iterdir()}
    # The snapshot is a referrer of an image that has a tag: it stays.
    cli("check", f"{layout}:latest")
    assert after > before


def test_mistakes(store: Cli):
    store.fails(2, "gc", "store:any", "--grace", "soon")
    store.fails(4, "gc", f"oci:{store.root}/none", hint=False)


def test_gc_waits_for_nobody(store: Cli, tmp_path):
    from imgsnap.oci.layout import LayoutRepository

    writer = LayoutRepository(store.store, create=True)
    try:
        assert "being written to" in store.fails(10, "gc", "store:any", "--grace", "0")
    finally:
        writer.close()
    store("gc", "store:any", "--grace", "0")


def collect_until(cli: Cli, stop: threading.Event, *arguments: str) -> list[int]:
    codes = []
    while not stop.is_set():
        codes.append(cli.any("gc", *arguments, "--grace", "0").code)
    return codes


def beside_gc(cli: Cli, work, *arguments: str) -> list[int]:
    stop = threading.Event()
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.extend(collect_until(cli, stop, *arguments)))
    thread.start()
    try:
        work()
    finally:
        stop.set()
        thread.join()
    return codes


def test_conversions_beside_gc_in_a_layout(cli: Cli, tmp_path):
    """Each takes chunks from what the one before stored, and gc is about to delete that."""

    def work() -> None:
        for number in range(6):
            write_layout(tmp_path / f"{number}", image(layer(number, number + 1, number + 2)))
            cli.convert(f"oci:{tmp_path}/{number}", f"store:app:{number}")
            if number % 2:
                cli("check", f"store:app:{number}", "--source", f"oci:{tmp_path}/{number}")

    codes = beside_gc(cli, work, "store:any", "--keep-tag", "app:[135]")
    assert set(codes) <= {0, 4, 10} and 0 in codes
    for number in (1, 3, 5):
        cli("check", f"store:app:{number}", "--source", f"oci:{tmp_path}/{number}")


@pytest.mark.registry
def test_a_registry(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    place = f"{registry.address}/{name}"
    for number, content in ((1, (1, 2)), (2, (2, 3))):
        write_layout(tmp_path / f"{number}", image(base_tar(), layer(*content)))
        cli.convert(f"oci:{tmp_path}/{number}", f"{place}:{number}", HTTP)
    keep = ("--keep-tag", "2", "--format", "json", HTTP)
    first = cli("gc", place, *keep).json
    assert first["deleted"] == [] and first["waiting"] == 2
    assert cli("gc", place, HTTP, "--format", "json").json["waiting"] == 0
    done = cli("gc", place, *keep, "--grace", "0").json
    assert {item["kind"] for item in done["deleted"]} == {"snapshot", "layer"}
    cli.fails(4, "inspect", HTTP, f"{place}:1")
    cli("check", HTTP, f"{place}:2")
    assert cli("gc", place, *keep, "--grace", "0").json["deleted"] == []
    cli.convert(f"oci:{tmp_path}/1", f"{place}:1", HTTP)
    cli("check", HTTP, f"{place}:1", "--source", f"oci:{tmp_path}/1")


@pytest.mark.registry
def test_the_grace_period_of_a_registry_begins_with_the_first_look(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    place = f"{registry.address}/{name}"
    write_layout(tmp_path / "one", image(layer(7)))
    cli.convert(f"oci:{tmp_path}/one", f"{place}:1", HTTP)
    keep = ("--keep-tag", "none", "--format", "json", HTTP, "--grace", "2s")
    assert cli("gc", place, *keep).json["waiting"] == 2
    time.sleep(2.1)
    assert len(cli("gc", place, *keep).json["deleted"]) == 2


@pytest.mark.registry
def test_conversions_beside_gc_in_a_registry(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    place = f"{registry.address}/{name}"

    def work() -> None:
        for number in range(4):
            write_layout(tmp_path / f"{number}", image(layer(number, number + 1, number + 2)))
            source = f"oci:{tmp_path}/{number}"
            options = ("--progress", "none", HTTP)
            if cli.any("convert", source, f"{place}:{number}", *options).code:
                cli("convert", source, f"{place}:{number}", *options)  # as its hint says
            if number % 2:
                cli("check", HTTP, f"{place}:{number}", "--source", source)

    codes = beside_gc(cli, work, place, HTTP, "--keep-tag", "[13]")
    assert 0 in codes
    for number in (1, 3):
        cli("check", HTTP, f"{place}:{number}", "--source", f"oci:{tmp_path}/{number}")


@pytest.mark.registry
def test_a_collected_image_in_a_registry(cli: Cli, registry: DockerRegistry, name: str):
    """The list of referrers is kept up to date."""
    remote = registry.put(name, collect(image(base_tar(), layer(9))))
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    value = cli("gc", f"{registry.address}/{name}", HTTP, "--keep-tag", "x", "--format", "json")
    assert value.json["waiting"] == 0, "it refers to an image that has a tag"
