"""What goes wrong around a command: disks, networks, damage, newer formats, signals."""

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from tests.support.cli import Cli, Result, refused
from tests.support.docker_registry import PASSWORD, USER, DockerRegistry, running_registry
from tests.support.image_builder import collect, image, sha256, write_layout
from tests.support.mounts import mounted
from tests.support.samples import base_tar, many_files, noise, top_tar
from tests.support.slow_link import slow_link
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"
PATIENCE_S = 60


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(process: subprocess.Popen) -> Result:
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Result(process.returncode, out.decode(), err.decode())


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x55]))


# Damage ------------------------------------------------------------------------------------------


def test_damage_in_the_node_cache_is_fetched_again(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    cli("warm", "store:app", "--progress", "none")
    files = [path for path in cli.cache.rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        for offset in range(0, path.stat().st_size, 20_000):
            flip(path, offset)
    assert cli.bytes_of("cat", "store:app", "usr/noise") == noise(300_000, 1)
    where = tmp_path / "tree"
    cli("mount", "store:app", where)
    try:
        assert (where / "usr/noise").read_bytes() == noise(300_000, 1)
        assert (where / "usr/text").read_bytes() == b"line\n" * 20_000
    finally:
        cli("umount", where)


def test_damage_in_the_store_is_an_error_to_the_reader(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(many_files()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    (pack,) = cli("inspect", "store:app", "--format", "json").json["packs"]
    blob = cli.store / "blobs/sha256" / pack["digest"].partition(":")[2]
    flip(blob, pack["size"] // 2)

    where = tmp_path / "tree"
    cli("mount", "store:app", where)
    try:
        right, wrong = 0, []
        for number in range(40):
            try:
                data = (where / f"f{number:02}").read_bytes()
                assert data == noise(60_000, number)
                right += 1
            except OSError as error:
                wrong.append(error.errno)
        assert set(wrong) == {errno.EIO} and right > 20
        (log,) = (cli.run_dir / "log").iterdir()
        text = log.read_text()
        assert pack["digest"] in text or "chunk" in text
        assert "damaged" in text
    finally:
        cli("umount", where)
    cli.fails(3, "check", "store:app", hint=False)
    result = cli.any("cat", "store:app", "f20")
    assert result.code in (0, 3) and "Traceback" not in result.err


def test_newer_formats_are_refused(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(1000)))
    layout = tmp_path / "made"
    cli.convert(f"oci:{tmp_path}/layout", f"oci:{layout}:now")
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(cli.bytes_of("inspect", "--raw", f"oci:{layout}:now"))

    def blob(digest: str) -> Path:
        return layout / "blobs/sha256" / digest.partition(":")[2]

    def described(data: bytes, like: dict) -> dict:
        blob(sha256(data)).write_bytes(data)
        return {**like, "digest": sha256(data), "size": len(data)}

    def publish(name: str, changed: dict) -> str:
        entry = described(
            json.dumps(changed).encode(),
            {"mediaType": manifest["mediaType"], "artifactType": manifest["artifactType"]},
        )
        names = {"org.opencontainers.image.ref.name": name}
        index["manifests"].append({**entry, "annotations": names})
        (layout / "index.json").write_text(json.dumps(index))
        return f"oci:{layout}:{name}"

    def with_config(name: str, **changes: object) -> str:
        config = json.loads(blob(manifest["config"]["digest"]).read_bytes())
        config["format"] |= changes
        raw = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
        return publish(name, {**manifest, "config": described(raw, manifest["config"])})

    def with_map(name: str, offset: int, value: int) -> str:
        layers = list(manifest["layers"])
        raw = bytearray(zstandard.decompress(blob(layers[1]["digest"]).read_bytes()))
        raw[offset] = value
        packed = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(raw))
        layers[1] = described(packed, layers[1])
        return publish(name, {**manifest, "layers": layers})

    newer = [
        with_config("config-version", version=2),
        with_config("config-feature", incompat=["encryption"]),
        with_map("map-version", 8, 3),
        with_map("map-feature", 20, 1),
    ]
    for ref in newer:
        where = tmp_path / "tree"
        for command in (("inspect", ref), ("cat", ref, "etc/hosts"), ("mount", ref, where)):
            err = cli.fails(8, *command)
            assert "upgrade" in err, err
        assert not where.exists()
    assert "encryption" in cli.fails(8, "check", newer[1])
    compatible = with_config("compat", compat=["something"], roCompat=["more"])
    assert cli("cat", compatible, "etc/hosts").out == "127.0.0.1 localhost\n"


# Disks -------------------------------------------------------------------------------------------


def test_full_disks_while_converting(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(many_files()))
    source = f"oci:{tmp_path}/layout"
    with mounted("tmpfs", tmp_path / "disk", "tmpfs", 0, "size=1m") as disk:
        err = cli.fails(9, "convert", source, "store:a", "--work-dir", disk, "--progress", "none")
        assert "--work-dir" in err and list(disk.iterdir()) == []
        target = f"oci:{disk}/layout:a"
        cli.fails(9, "convert", source, target, "--progress", "none")
        assert cli("ls", "-q", f"oci:{disk}/layout").out == ""
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        cli.convert(source, target)
        assert cli.bytes_of("cat", target, "f07") == noise(60_000, 7)


def test_a_full_cache_still_gives_the_right_bytes(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(many_files()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    where = tmp_path / "tree"
    with mounted("tmpfs", tmp_path / "disk", "tmpfs", 0, "size=600k") as disk:
        cli("--cache-dir", disk, "mount", "store:app", where)
        try:
            for number in range(40):
                assert (where / f"f{number:02}").read_bytes() == noise(60_000, number)
        finally:
            cli("umount", where)


# Networks ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_registry_that_goes_away_between_two_reads(
    cli: Cli, own_registry: DockerRegistry, tmp_path
):
    remote = own_registry.put("app", collect(image(many_files(size=400_000, count=6))))
    cli.convert(remote, f"{own_registry.address}/app:snap", HTTP)
    where = tmp_path / "tree"
    cli("mount", HTTP, remote, where)
    try:
        assert (where / "f00").read_bytes() == noise(400_000, 0)
        own_registry.stop()
        with pytest.raises(OSError) as caught, (where / "f05").open("rb") as file:
            os.pread(file.fileno(), 1, 200_000)
        assert caught.value.errno == errno.EIO
        assert (where / "f00").read_bytes() == noise(400_000, 0)
        own_registry.start()
        assert (where / "f05").read_bytes() == noise(400_000, 5)
    finally:
        cli("umount", where)


@pytest.mark.slow
def test_no_registry_at_all(cli: Cli, own_registry: DockerRegistry, tmp_path):
    """The waits between attempts overlap: all commands run at once."""
    remote = own_registry.put("app", collect(image(base_tar())))
    snap = f"{own_registry.address}/app:snap"
    digest = cli.convert(remote, snap, HTTP)
    cli("inspect", HTTP, snap)
    own_registry.stop()
    nodes = [Cli(cli.root / f"node-{n}") for n in range(4)]
    started = [
        nodes[0].start("convert", HTTP, remote, "store:x", "--progress", "none"),
        nodes[1].start("inspect", HTTP, snap),
        nodes[2].start("mount", HTTP, snap, tmp_path / "tree"),
        nodes[3].start("ls", HTTP, f"{own_registry.address}/app"),
    ]
    remembered = cli.start("inspect", HTTP, snap, "--format", "json")
    for process in started:
        refused(finished(process), 6)
    assert not (tmp_path / "tree").exists()
    assert [node.leftovers() for node in nodes] == [[]] * 4
    # A tag that was asked for before is answered from the cache, with a warning.
    result = finished(remembered)
    assert result.code == 0 and result.json["digest"] == f"sha256:{digest}"
    assert result.err.startswith("warning: ") and "does not answer" in result.err


def test_tls_and_plain_http(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    # On loopback http is found out without --plain-http, as docker does.
    plain = registry.put(name, collect(image(base_tar(1000))))
    cli.convert(plain, "store:x")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    write_layout(tmp_path / "layout", image(base_tar(1000)))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    with running_registry(tmp_path / "tls", certificate=(certificate, key)) as secure:
        target = f"{secure.address}/app:1"
        err = cli.fails(6, "push", "store:app", target, "--progress", "none")
        assert "--ca-file" in err
        cli("push", "store:app", target, "--progress", "none", "--ca-file", certificate)
        out = cli("cat", target, "etc/hosts", "--insecure").out
        assert out == "127.0.0.1 localhost\n"
        result = cli.any("inspect", HTTP, target)
        assert result.code != 0
        refused(result, result.code)
        assert "remove --plain-http" in result.err


def test_passwords(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(1000)))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")

    def credentials(text: str) -> Path:
        import base64

        path = tmp_path / "auth.json"
        value = base64.b64encode(text.encode()).decode()
        path.write_text(json.dumps({"auths": {closed.address: {"auth": value}}}))
        return path

    with running_registry(tmp_path / "closed", auth=True) as closed:
        target = f"{closed.address}/app:1"
        push = ("push", HTTP, "store:app", target, "--progress", "none", "--registry-config")
        assert "log in" in cli.fails(5, *push[:-1])
        assert "log in" in cli.fails(5, *push, credentials(f"{USER}:wrong"))
        good = credentials(f"{USER}:{PASSWORD}")
        cli(*push, good)
        assert "log in" in cli.fails(5, "inspect", HTTP, target)
        docker = cli.root / "home/.docker"
        docker.mkdir()
        good.rename(docker / "config.json")
        assert cli("cat", HTTP, target, "etc/hosts").out == "127.0.0.1 localhost\n"


# Signals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_while_converting(
    cli: Cli, registry: DockerRegistry, name: str, number: int, code: int
):
    large = layer_tar([Item(b"large", content=noise(4_000_000, 2))])
    remote = registry.put(name, collect(image(base_tar(), large)))
    with slow_link(registry.port, 1_500_000) as link:
        source = remote.replace(registry.address, link.address)
        process = cli.start("convert", HTTP, source, "store:app", "--progress", "none", "-j", 2)
        index = cli.store / "index.json"
        until(
            lambda: (
                link.reached.is_set() and index.exists() and b"imgsnap-layer" in index.read_bytes()
            )
        )
        os.kill(process.pid, number)
        result = finished(process)
    assert result.code == code
    if number == signal.SIGINT:
        refused(result, code, hint=False)
    assert "Traceback" not in result.err
    assert list(cli.tmp.iterdir()) == [] and cli.processes() == []
    assert cli("ls", "-q").out == ""
    report = cli.report(remote, "store:app", HTTP)
    assert [layer["reused"] for layer in report["images"][0]["layers"]] == [True, False]
    assert cli.bytes_of("cat", "store:app", "large") == noise(4_000_000, 2)


def test_a_reader_of_the_output_that_goes_away(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(2_000_000), top_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    process = cli.start("cat", "store:app", "usr/noise")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(PATIENCE_S) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
