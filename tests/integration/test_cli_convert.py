"""imgsnap convert: every source to every target, the same bytes; nothing done twice."""

import json

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import (
    Image,
    LayerBlob,
    collect,
    image,
    recompressed,
    write_docker_archive,
    write_layout,
    write_oci_archive,
)
from tests.support.samples import base_tar, noise, top_tar
from tests.support.tars import Item, layer_tar

pytestmark = pytest.mark.registry
HTTP = "--plain-http"


def rows(cli: Cli, ref: str) -> list[dict]:
    return cli("inspect", HTTP, "--format", "json", ref).json["layers"]


def test_every_source_and_target_gives_one_digest(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    made = image(base_tar(), top_tar())
    digest = write_layout(tmp_path / "layout", made, "1.0")
    assert write_oci_archive(tmp_path / "archive.tar", made, "1.0") == digest
    remote = registry.put(name, collect(made, "1.0"))
    sources = [remote, f"oci:{tmp_path}/layout:1.0", f"oci-archive:{tmp_path}/archive.tar:1.0"]
    sources += [f"oci:{tmp_path}/layout", f"{remote.rpartition(':')[0]}@{digest}"]
    found = set()
    for number, source in enumerate(sources):
        for target in (
            f"{registry.address}/{name}-{number}:snap",
            f"store:{name}-{number}:snap",
            f"oci:{tmp_path}/out-{number}:snap",
        ):
            found.add(cli.convert(source, target, HTTP))
    assert len(found) == 1


def test_docker_archive_and_docker_manifests_convert_to_the_same_layers(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    made = image(base_tar(), top_tar())
    write_layout(tmp_path / "layout", made)
    write_docker_archive(tmp_path / "saved.tar", made, "team/app:2")
    schema2 = Image(made.layers, docker=True)
    remote = registry.put(name, collect(schema2))
    digests = {
        cli.convert(f"docker-archive:{tmp_path}/saved.tar:team/app:2", "store:a"),
        cli.convert(f"docker-archive:{tmp_path}/saved.tar", "store:b"),
    }
    assert len(digests) == 1
    cli.convert(remote, "store:c", HTTP)
    cli.convert(f"oci:{tmp_path}/layout", "store:d")
    extents = [[row["extentID"] for row in rows(cli, f"store:{n}")] for n in "abcd"]
    assert extents[0] == extents[1] == extents[2] == extents[3]
    for store in "acd":
        differences = cli(
            "check", f"store:{store}", "--source", f"oci:{tmp_path}/layout", "--format", "json"
        )
        assert differences.json["differences"] == []


@pytest.mark.parametrize("compression", ["", "gzip", "zstd"])
def test_layer_compressions(cli: Cli, tmp_path, compression: str):
    made = recompressed(image(base_tar(), top_tar()), compression)
    write_layout(tmp_path / "layout", made)
    cli.convert(f"oci:{tmp_path}/layout", "store:a")
    checked = cli("check", "store:a", "--source", f"oci:{tmp_path}/layout", "--format", "json")
    assert checked.json["differences"] == [] and checked.json["entries"] > 10
    wanted = image(base_tar(), top_tar(), compression="gzip")
    write_layout(tmp_path / "other", wanted)
    cli.convert(f"oci:{tmp_path}/other", "store:b")
    assert rows(cli, "store:a") == rows(cli, "store:b")


def test_an_image_without_layers(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", Image(()))
    cli.convert(f"oci:{tmp_path}/layout", "store:empty")
    assert cli("files", "store:empty", "--format", "json").json["files"] == []


def test_several_platforms(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    images = [
        image(base_tar(), top_tar(b"amd64")),
        image(base_tar(), top_tar(b"arm64"), architecture="arm64", variant="v8"),
        image(base_tar(), top_tar(b"s390x"), architecture="s390x"),
    ]
    remote = registry.put(name, collect(images))
    cli.convert(remote, "store:one", HTTP, "--platform", "linux/arm64")
    one = cli("inspect", "store:one", "--format", "json").json
    assert one["platform"] == "linux/arm64/v8"

    cli.convert(remote, "store:two", HTTP, "--platform", "linux/arm64", "--platform", "linux/s390x")
    err = cli.fails(4, "inspect", "store:two", "--platform", "linux/amd64")
    assert "linux/arm64/v8" in err and "linux/s390x" in err
    arm = cli("inspect", "store:two", "--platform", "linux/arm64", "--format", "json").json
    assert arm["digest"] == one["digest"]

    report = cli.report(remote, f"{registry.address}/{name}:snap", HTTP, "--all-platforms")
    assert [i["platform"] for i in report["images"]] == [
        "linux/amd64",
        "linux/arm64/v8",
        "linux/s390x",
    ]
    snap = f"{registry.address}/{name}:snap"
    assert cli("files", HTTP, snap, "srv", "--platform", "linux/s390x").out == "s390x\n"
    assert cli.report(remote, snap, HTTP, "--all-platforms")["upToDate"]

    err = cli.fails(4, "convert", remote, "store:three", HTTP, "--platform", "linux/riscv64")
    for offered in ("linux/amd64", "linux/arm64/v8", "linux/s390x"):
        assert offered in err
    err = cli.fails(
        4, "convert", remote, "store:x", HTTP, "--platform", "windows/amd64", "--progress", "none"
    )
    cli.fails(2, "convert", remote, "store:x", HTTP, "--platform", "amd64")
    cli.fails(
        2, "convert", remote, "store:x", "--all-platforms", "--platform", "linux/arm64", hint=False
    )
    listed = {row["name"] for row in cli("ls", "--format", "json").json["snapshots"]}
    assert listed == {"store:one:latest", "store:two:latest"}


def test_an_image_reference_stands_for_its_snapshot(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    """docker-registry has no referrers API: the tag schema leads from image to snapshot."""
    remote = registry.put(name, collect(image(base_tar(), top_tar()), "1.0"))
    digest = cli.convert(remote, f"{registry.address}/{name}:1.0-imgsnap", HTTP)
    value = cli("inspect", HTTP, remote, "--format", "json").json
    assert value["digest"] == f"sha256:{digest}"
    assert cli("cat", HTTP, remote, "/etc/hosts").out == "replaced by top\n"

    layout = tmp_path / "layout"
    source = write_layout(layout, image(base_tar(), top_tar()), "1.0")
    cli.convert(f"oci:{layout}:1.0", f"oci:{layout}:snap")
    value = cli("inspect", f"oci:{layout}:1.0", "--format", "json").json
    assert value["digest"] == f"sha256:{digest}"
    assert value["source"]["manifest"] == source


def test_an_index_whose_images_have_snapshots(cli: Cli, registry: DockerRegistry, name: str):
    images = [image(base_tar()), image(base_tar(), top_tar(), architecture="arm64")]
    remote = registry.put(name, collect(images))
    snap = f"{registry.address}/{name}:snap"
    cli("convert", remote, snap, HTTP, "--platform", "linux/arm64", "--progress", "none")
    out = cli("cat", HTTP, remote, "srv/top", "--platform", "linux/arm64").out
    assert out == "top" * 3000


def test_shared_layers_are_neither_fetched_nor_converted_again(
    cli: Cli, registry: DockerRegistry, name: str
):
    base = base_tar()
    first = image(base, top_tar(b"one"))
    second = image(base, top_tar(b"two"))
    one = registry.put(name, collect(first, "one"))
    two = registry.put(name, collect(second, "two"))
    snap = f"{registry.address}/{name}:snap-"
    cli.convert(one, snap + "one", HTTP)
    registry.accesses()

    report = cli.report(two, snap + "two", HTTP)
    layers = report["images"][0]["layers"]
    assert [layer["reused"] for layer in layers] == [True, False]
    shared = _digest(first, 0)
    log = registry.accesses()
    assert not [a for a in log if a.method == "GET" and shared in a.path]
    assert [a for a in log if a.method == "GET" and _digest(second, 1) in a.path]

    # Another machine with nothing but the registry: what has been converted is found there.
    other = Cli(cli.root / "other")
    report = other.report(two, snap + "again", HTTP)
    assert all(layer["reused"] for layer in report["images"][0]["layers"])
    log = registry.accesses()
    assert not [a for a in log if a.method == "GET" and _digest(second, 1) in a.path]


def _digest(made: Image, layer: int) -> str:
    entry = collect(made).add_image(made)
    manifest = json.loads(collect(made).by_digest[entry["digest"]])
    return manifest["layers"][layer]["digest"]


def test_converting_an_unchanged_image_does_nothing(cli: Cli, registry: DockerRegistry, name: str):
    remote = registry.put(name, collect(image(base_tar(), top_tar())))
    snap = f"{registry.address}/{name}:snap"
    digest = cli.convert(remote, snap, HTTP)
    registry.accesses()
    again = cli("convert", remote, snap, HTTP)
    assert "up to date" in again.out and digest in again.out
    log = registry.accesses()
    assert {a.method for a in log} <= {"GET", "HEAD"}
    manifest = len(cli("inspect", HTTP, "--raw", snap).out)  # small parts are in it
    assert sum(a.size for a in log if a.method == "GET") < 4096 + manifest
    forced = cli.report(remote, snap, HTTP, "--force")
    assert forced["digest"] == f"sha256:{digest}" and not forced["upToDate"]


def test_chunks_are_stored_once_in_a_repository(cli: Cli, registry: DockerRegistry, name: str):
    data = noise(4_000_000, 7)
    one = registry.put(name, collect(image(layer_tar([Item(b"a", content=data)])), "one"))
    moved = layer_tar([Item(b"elsewhere/b", content=data), Item(b"new", content=b"n" * 9000)])
    two = registry.put(name, collect(image(moved), "two"))
    snap = f"{registry.address}/{name}:snap-"
    cli.convert(one, snap + "one", HTTP)
    report = cli.report(two, snap + "two", HTTP)
    (layer,) = report["images"][0]["layers"]
    assert not layer["reused"] and layer["chunks"] > 10
    assert layer["new_chunks"] <= 2 and layer["stored"] < 300_000
    checked = cli("check", HTTP, snap + "two", "--source", two, "--format", "json").json
    assert checked["differences"] == []


def test_no_blob_is_uploaded_twice(cli: Cli, registry: DockerRegistry, name: str):
    """docker-registry refuses a manifest while another request stores a blob that it lists."""
    tars = [layer_tar([Item(b"f%d" % n, content=noise(5000, n))]) for n in range(8)]
    remote = registry.put(name, collect(image(*tars)))
    registry.accesses()
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP, "--jobs", 8)
    found = [a.path.rpartition("digest=")[2] for a in registry.accesses() if a.method == "PUT"]
    uploads = [digest for digest in found if digest.startswith("sha256")]
    assert len(uploads) == len(set(uploads)) > 20


def test_reuse_mounts_packs_of_another_repository(cli: Cli, registry: DockerRegistry, name: str):
    data = noise(2_000_000, 8)
    shared = layer_tar([Item(b"a", content=data)])
    moved = layer_tar([Item(b"b", content=data), Item(b"extra", content=b"1")])
    one = registry.put(f"{name}/one", collect(image(shared)))
    two = registry.put(f"{name}/two", collect(image(shared, moved)))
    cli.convert(one, f"{registry.address}/{name}/one:snap", HTTP)
    registry.accesses()

    snap = f"{registry.address}/{name}/two:snap"
    reuse = f"{registry.address}/{name}/one"
    report = cli.report(two, snap, HTTP, "--reuse", reuse)
    first, second = report["images"][0]["layers"]
    assert first["reused"] and second["new_chunks"] <= 2
    log = registry.accesses()
    mounts = [a for a in log if a.method == "POST" and "mount=" in a.path]
    assert [a.status for a in mounts] == [201]
    packs = cli("inspect", HTTP, snap, "--format", "json").json["packs"]
    put = [a.path for a in log if a.method == "PUT" and "digest=" in a.path]
    big = max(packs, key=lambda pack: pack["size"])["digest"]
    assert not [path for path in put if big.partition(":")[2] in path]
    checked = cli("check", HTTP, snap, "--source", two, "--format", "json").json
    assert checked["differences"] == []


def test_bytes_do_not_depend_on_threads_order_or_place(cli: Cli, tmp_path):
    tars = [
        layer_tar(
            [
                Item(b"d%d/f%d" % (layer, n), content=noise(1000 + 9000 * n, layer * 40 + n % 7))
                for n in range(30)
            ]
        )
        for layer in range(4)
    ]
    # Sizes that rise in one image and fall in the other: ingestion begins with the largest blob.
    sizes = [LayerBlob(tar, "gzip") for tar in tars]
    write_layout(tmp_path / "image", Image(tuple(sizes)))
    plain = tuple(LayerBlob(tar, "" if n % 2 else "gzip") for n, tar in enumerate(tars))
    write_layout(tmp_path / "other", Image(plain))
    digests, packs = set(), []
    for number, jobs in enumerate((1, 2, 8)):
        store = Cli(cli.root / f"place-{number}")
        digests.add(store.convert(f"oci:{tmp_path}/image", "store:app", "--jobs", jobs))
        packs.append(store("inspect", "store:app", "--format", "json").json["packs"])
    assert len(digests) == 1
    store = Cli(cli.root / "place-other")
    store.convert(f"oci:{tmp_path}/other", "store:app")
    packs.append(store("inspect", "store:app", "--format", "json").json["packs"])
    assert packs[0] == packs[1] == packs[2] == packs[3]


def test_report(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    report = cli.report(f"oci:{tmp_path}/layout", "store:app")
    assert report["schema"] == 1 and report["target"] == "store:app"
    assert report["seconds"] > 0 and report["cpuSeconds"] > 0 and report["maxRSS"] > 1 << 20
    (made,) = report["images"]
    assert made["digest"] == report["digest"] and made["inodes"] == 12
    base, top = made["layers"]
    assert base["new_chunks"] == base["chunks"] - 3  # those of usr/zeros are stored nowhere
    assert base["stored"] > 300_000
    assert top["extent"] == 4096 + 12288  # etc/hosts and srv/top
    again = cli.report(f"oci:{tmp_path}/layout", "store:app")
    assert again["upToDate"] and again["images"] == []


def test_progress(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar()))
    source = f"oci:{tmp_path}/layout"
    plain = cli("convert", source, "store:a", "--progress", "plain").err
    assert "fetch" in plain and "pack" in plain and "done" in plain and "\x1b" not in plain
    assert cli("convert", source, "store:b", "--force", "--progress", "none").err == ""
    write_layout(tmp_path / "second", image(base_tar(1000)))
    bars = cli("convert", f"oci:{tmp_path}/second", "store:c", "--progress", "tty").err
    assert "\x1b[" in bars


def test_options(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(2_000_000)))
    source = f"oci:{tmp_path}/layout"
    digest = cli.convert(source, "store:default")
    smaller = cli.report(source, "store:small", "--chunk-size", "32KiB")
    assert smaller["digest"] != f"sha256:{digest}"
    chunks = smaller["images"][0]["layers"][0]["chunks"]
    assert chunks > 2 * rows(cli, "store:default")[0]["chunks"]
    cli.convert(source, f"oci:{tmp_path}/level:a", "--compression", "zstd:9")
    level = cli("inspect", f"oci:{tmp_path}/level:a", "--format", "json").json
    default = cli("inspect", "store:default", "--format", "json").json
    assert level["layers"][0]["extentID"] == default["layers"][0]["extentID"]
    for bad in (
        ("--compression", "gzip:3"),
        ("--compression", "zstd:99"),
        ("--chunk-size", "1000"),
        ("--chunk-size", "12parsecs"),
        ("--limit", "nonsense=1"),
        ("--limit", "entries=many"),
    ):
        result = cli.any("convert", source, "store:bad", *bad)
        assert result.code == 2 and result.err.startswith("error: "), (bad, result.err)


@pytest.mark.slow
def test_memory_is_bounded(cli: Cli, tmp_path):
    """An image of 300 MB, one large layer with one large file among small ones."""
    items = [Item(b"large", content=noise(1 << 20, 3) * 200)]
    items += [Item(b"small/%d" % n, content=noise(50_000, n)) for n in range(2000)]
    write_layout(tmp_path / "layout", image(layer_tar(items), compression=""))
    report = cli.report(f"oci:{tmp_path}/layout", "store:large")
    assert report["images"][0]["deviceSize"] > 300_000_000
    assert report["maxRSS"] < 300 << 20
