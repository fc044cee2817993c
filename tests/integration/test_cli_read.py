"""inspect, files, cat, check and warm: what they tell, and how little they fetch."""

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.samples import SYM, base_tar, noise, top_tar
from tests.support.tars import Item, layer_tar

pytestmark = pytest.mark.registry
HTTP = "--plain-http"


@pytest.fixture
def app(cli: Cli, tmp_path) -> str:
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    return "store:app"


def test_reading_a_remote_snapshot_fetches_kilobytes(cli: Cli, registry: DockerRegistry, name: str):
    files = [Item(b"data/%03d" % n, content=noise(40_000, n)) for n in range(150)]
    remote = registry.put(name, collect(image(layer_tar(files))))
    snap = f"{registry.address}/{name}:snap"
    cli.convert(remote, snap, HTTP)
    registry.accesses()
    commands = (
        ("inspect", HTTP, snap),
        ("files", HTTP, "-R", "-l", snap),
        ("cat", HTTP, snap, "data/077"),
    )
    for number, command in enumerate(commands):
        fresh = Cli(cli.root / f"node-{number}")
        fresh.bytes_of(*command)
        fetched = sum(a.size for a in registry.accesses() if a.method == "GET")
        assert 0 < fetched < 600_000, command
    assert cli.bytes_of("cat", HTTP, snap, "data/077") == noise(40_000, 77)


def test_inspect(cli: Cli, app: str):
    value = cli("inspect", app, "--format", "json").json
    assert set(value) == {
        *("schema", "digest", "platform", "source", "rules", "deviceSize", "inodes", "uuid"),
        *("metadata", "chunkMap", "packs", "stored", "verity", "layers", "bootPacks"),
    }
    assert value["platform"] == "linux/amd64" and value["inodes"] == 12
    base, top = value["layers"]
    assert base["zeroChunks"] == 3 and base["unique"] + base["shared"] == base["stored"]
    assert top["chunks"] and value["deviceSize"] > 500_000
    assert value["stored"] == sum(pack["size"] for pack in value["packs"])
    table = cli("inspect", app).out
    assert value["digest"] in table and base["diffID"][7:19] in table
    manifest = cli.bytes_of("inspect", app, "--raw")
    assert b"application/vnd.imgsnap.snapshot.v1+json" in manifest


def test_files(cli: Cli, app: str):
    assert cli("files", app, "etc").out == "hosts\n"
    listed = cli("files", app, "-R", "--format", "json").json["files"]
    by_path = {entry["path"]: entry for entry in listed}
    assert by_path["lib"]["type"] == "symlink" and by_path["lib"]["target"] == "usr"
    assert by_path["usr/noise"] == {
        "path": "usr/noise",
        "type": "file",
        "mode": "0755",
        "uid": 1000,
        "gid": 70000,
        "size": 300_000,
        "mtime": 0,
        "links": 1,
    }
    assert by_path["usr/linked"]["links"] == 2 and by_path["srv/top"]["mtime"] == -6
    assert by_path["srv"]["mode"] == "1777"
    assert "etc/gone" not in by_path and "\\xff\\xfe" in by_path and "naïve" in by_path
    long = cli("files", app, "-l", "/").out
    assert "lrwxrwxrwx" in long and "lib -> usr" in long and "drwxrwxrwt" in long
    assert cli("files", app, "lib/text").out == "lib/text\n"
    assert cli("files", app, "lib/").out == cli("files", app, "usr").out
    err = cli.fails(4, "files", app, "usr/absent", hint=False)
    assert err == "error: usr/absent: there is no absent in the snapshot\n"


def test_cat(cli: Cli, app: str):
    assert cli.bytes_of("cat", app, "/usr/noise") == noise(300_000, 1)
    assert cli.bytes_of("cat", app, "lib/text") == b"line\n" * 20_000
    assert cli.bytes_of("cat", app, "usr/zeros") == bytes(800_000)
    assert cli.bytes_of("cat", app, b"\xff\xfe".decode("utf-8", "surrogateescape")) == (
        b"a name of none"
    )
    assert "directory" in cli.fails(2, "cat", app, "usr")
    cli.fails(4, "cat", app, "usr/absent", hint=False)
    cli.fails(4, "cat", app, "usr/noise/below", hint=False)


def test_paths_that_lead_in_circles(cli: Cli, tmp_path):
    tar = layer_tar([Item(b"a", SYM, link=b"b"), Item(b"b", SYM, link=b"/a")])
    write_layout(tmp_path / "layout", image(tar))
    cli.convert(f"oci:{tmp_path}/layout", "store:loop")
    assert "symlink" in cli.fails(4, "cat", "store:loop", "a/x", hint=False).lower()


def test_check(cli: Cli, app: str, tmp_path):
    clean = cli("check", app, "--format", "json").json
    assert clean["entries"] == 13 and clean["differences"] == [] and clean["packs"] == 2
    assert "13 entries walked" in cli("check", app).out
    source = f"oci:{tmp_path}/layout"
    assert f"no difference from {source}" in cli("check", app, "--source", source).out

    changed = layer_tar(
        [
            Item(b"etc/hosts", content=b"replaced by mop\n", mode=0o600),
            Item(b"usr/.wh.zeros"),
            Item(b"lib", SYM, mode=0o777, link=b"/usr"),
            Item(b"usr/noise", content=noise(300_000, 1), uid=7),
            Item(b"more"),
        ]
    )
    write_layout(tmp_path / "changed", image(base_tar(), top_tar(), changed))
    result = cli.any("check", app, "--source", f"oci:{tmp_path}/changed", "--format", "json")
    assert result.code == 3 and "differs from" in result.err
    found = {(d["path"], d["field"]) for d in result.json["differences"]}
    assert found == {
        ("etc/hosts", "mode"),
        ("etc/hosts", "content"),
        ("usr/zeros", "extra"),
        ("lib", "target"),
        ("usr/noise", "mode"),
        ("usr/noise", "owner"),
        ("more", "missing"),
    }
    table = cli.any("check", app, "--source", f"oci:{tmp_path}/changed").out
    assert "lib: target: b'usr' (source: b'/usr')" in table


def test_warm_then_no_registry(cli: Cli, own_registry: DockerRegistry, tmp_path):
    remote = own_registry.put("app", collect(image(base_tar(), top_tar())))
    snap = f"{own_registry.address}/app:snap"
    cli.convert(remote, snap, HTTP)
    cli("warm", HTTP, snap, "--progress", "none")
    digest = cli("inspect", HTTP, snap, "--format", "json").json["digest"]
    own_registry.stop()
    by_digest = f"{own_registry.address}/app@{digest}"
    assert cli.bytes_of("cat", HTTP, by_digest, "usr/noise") == noise(300_000, 1)
    where = tmp_path / "mounted"
    cli("mount", HTTP, by_digest, where)
    try:
        assert (where / "usr/noise").read_bytes() == noise(300_000, 1)
        assert (where / "usr/linked").read_bytes() == b"line\n" * 20_000
        assert (where / "usr/zeros").read_bytes() == bytes(800_000)
    finally:
        cli("umount", where)
