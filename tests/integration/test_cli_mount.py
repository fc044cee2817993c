"""mount, mounts, umount and run: the tree is the source's, and nothing stays behind."""

import os
import random
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.docker_registry import DockerRegistry
from tests.support.image_builder import collect, image, write_layout
from tests.support.node import wait_for
from tests.support.samples import base_tar, noise, program_tar, top_tar
from tests.support.tars import Item, layer_tar

pytestmark = [pytest.mark.root, pytest.mark.registry]
HTTP = "--plain-http"


@contextmanager
def mounted(cli: Cli, ref: str, where: Path, *options: str) -> Iterator[Path]:
    cli("mount", HTTP, ref, where, *options)
    try:
        yield where
    finally:
        cli("umount", where)


@pytest.fixture
def app(cli: Cli, tmp_path) -> str:
    write_layout(tmp_path / "layout", image(base_tar(), top_tar()))
    cli.convert(f"oci:{tmp_path}/layout", "store:app")
    return "store:app"


@pytest.fixture
def program(cli: Cli, tmp_path):
    """Converts an image with these settings; its reference."""

    def make(**run: object) -> str:
        write_layout(tmp_path / "program", image(program_tar(), run=run, compression=""))
        cli.convert(f"oci:{tmp_path}/program", "store:program")
        return "store:program"

    return make


def test_mount_and_umount(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    value = cli("mount", app, where, "--format", "json").json
    assert value["target"] == str(where) and value["digest"].startswith("sha256:")
    (listed,) = cli("mounts", "--format", "json").json["mounts"]
    assert listed["target"] == str(where) and listed["digest"] == value["digest"]
    assert listed["alive"] and not listed["writable"] and listed["created"] > 0
    assert listed["pid"] in cli.processes()
    assert str(where) in cli("mounts").out

    assert sorted(os.listdir(os.fsencode(where))) == sorted(
        [b"etc", b"lib", "naïve".encode(), b"srv", b"usr", b"\xff\xfe"]
    )
    assert (where / "lib/noise").read_bytes() == noise(300_000, 1)
    status = (where / "usr/noise").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 70000, 0o755)
    assert os.getxattr(where / "usr/text", "user.note") == b"\0\xff"
    assert (where / "usr/text").samefile(where / "usr/linked")
    assert (where / "usr").stat().st_mtime_ns == 1_700_000_000_123_456_789
    assert (where / "srv/top").stat().st_mtime_ns == -5_500_000_000
    with pytest.raises(OSError, match="Read-only"):
        (where / "new").write_text("")

    cli("umount", where)
    assert not where.exists()
    assert cli("mounts", "--format", "json").json["mounts"] == []
    assert cli.leftovers() == []


def test_a_directory_that_was_there_stays(cli: Cli, app: str, tmp_path):
    where = tmp_path / "there"
    where.mkdir()
    with mounted(cli, app, where):
        assert (where / "etc/hosts").exists()
    assert where.is_dir() and not list(where.iterdir())


def test_writable_mounts_drop_their_changes(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    with mounted(cli, app, where, "--rw"):
        assert cli("mounts", "--format", "json").json["mounts"][0]["writable"]
        (where / "etc/hosts").write_text("changed")
        (where / "new").mkdir()
        (where / "usr/zeros").unlink()
        assert (where / "etc/hosts").read_text() == "changed"
    assert cli.leftovers() == []
    with mounted(cli, app, where, "--rw"):
        assert (where / "etc/hosts").read_text() == "replaced by top\n"
        assert not (where / "new").exists() and (where / "usr/zeros").exists()


def test_several_mounts_share_the_cache_and_end_together(
    cli: Cli, registry: DockerRegistry, name: str, tmp_path
):
    remote = registry.put(name, collect(image(base_tar(), top_tar())))
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    places = [tmp_path / f"tree-{n}" for n in range(3)]
    cli("mount", HTTP, remote, places[0])
    assert (places[0] / "usr/noise").read_bytes() == noise(300_000, 1)
    registry.accesses()
    for where in places[1:]:
        cli("mount", HTTP, remote, where, "--rw")
        assert (where / "usr/noise").read_bytes() == noise(300_000, 1)
    fetched = sum(a.size for a in registry.accesses() if a.method == "GET")
    assert fetched < 20_000
    assert len(cli("mounts", "--format", "json").json["mounts"]) == 3
    cli("umount", "--all")
    assert cli.leftovers() == []


def test_parallel_readers_get_every_byte(cli: Cli, registry: DockerRegistry, name: str, tmp_path):
    chosen = random.Random(5)
    files = {
        b"d%d/f%d" % (n % 7, n): noise(chosen.choice([1, 4096, 70_000, 400_000]), n)
        for n in range(60)
    }
    half = len(files) // 2
    layers = [
        layer_tar([Item(path, content=data) for path, data in part])
        for part in (list(files.items())[:half], list(files.items())[half:])
    ]
    remote = registry.put(name, collect(image(*layers)))
    cli.convert(remote, f"{registry.address}/{name}:snap", HTTP)
    wrong: list[object] = []

    def read(where: Path, seed: int) -> None:
        order = list(files)
        random.Random(seed).shuffle(order)
        try:
            for path in order:
                data, expected = bytearray(), files[path]
                with open(os.path.join(os.fsencode(where), path), "rb") as file:
                    if seed % 2:  # from the end, in pieces that no block divides
                        for start in range(len(expected) // 50_021 * 50_021, -1, -50_021):
                            data[:0] = os.pread(file.fileno(), 50_021, start)
                    else:
                        data += file.read()
                if data != expected:
                    wrong.append(path)
        except OSError as error:
            wrong.append(error)

    with mounted(cli, remote, tmp_path / "tree") as where:
        readers = [threading.Thread(target=read, args=(where, seed)) for seed in range(6)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert wrong == []
    assert (
        cli("check", HTTP, remote, "--source", remote, "--format", "json").json["differences"] == []
    )


def test_what_cannot_be_mounted(cli: Cli, app: str, tmp_path):
    (tmp_path / "file").write_text("")
    cli.fails(2, "mount", app, tmp_path / "file", hint=False)
    err = cli.fails(4, "mount", app, tmp_path / "no/such/parent")
    assert "parent" in err
    cli.fails(4, "mount", "store:absent", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()
    with mounted(cli, app, tmp_path / "tree"):
        assert "already" in cli.fails(7, "mount", app, tmp_path / "tree")
        with (tmp_path / "tree/etc/hosts").open() as held:
            assert "in use" in cli.fails(10, "umount", tmp_path / "tree")
            assert held.read() == "replaced by top\n"
        assert (tmp_path / "tree/usr/text").exists()
    cli.fails(4, "umount", tmp_path / "tree")
    cli.fails(4, "umount", "/")
    cli.fails(4, "umount", "/proc")
    cli.fails(2, "umount")
    cli.fails(2, "umount", "--all", tmp_path / "tree")
    cli("umount", "--all")


def test_lazy_umount_keeps_open_files(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    cli("mount", app, where)
    with (where / "usr/noise").open("rb") as held:
        cli("umount", "--lazy", where)
        assert not where.exists()
        assert held.read() == noise(300_000, 1)
    wait_for(lambda: not cli.leftovers(), "nothing left")


def test_a_killed_server_is_cleaned_up(cli: Cli, app: str, tmp_path):
    where = tmp_path / "tree"
    cli("mount", app, where)
    (record,) = cli("mounts", "--format", "json").json["mounts"]
    os.kill(record["pid"], 9)
    for _ in range(100):
        (record,) = cli("mounts", "--format", "json").json["mounts"]
        if not record["alive"]:
            break
    assert not record["alive"] and "dead" in cli("mounts").out
    cli("umount", where)
    # the block server, whose supervisor it was that was killed, ends by itself
    wait_for(lambda: not cli.leftovers(), "nothing left")


RUNTIMES = ["runc", "unshare"]


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, tmp_path) -> dict[str, str]:
    """The environment in which `run` finds this one."""
    if request.param == "runc":
        return {}
    programs = tmp_path / "programs"
    programs.mkdir()
    for program in ("unshare", "mount", "sh", "env", "umount"):
        (programs / program).symlink_to(shutil.which(program) or "")
    return {"PATH": str(programs)}


def test_run_uses_the_images_settings(cli: Cli, program, runtime):
    ref = program(
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $NAME $HOME; id -u; id -g; pwd; exit 7"],
        Env=["PATH=/bin", "NAME=a value"],
        WorkingDir="/work",
        User="app",
    )
    result = cli.any("run", ref, env=runtime)
    assert result.out == "a value /home/app\n1234\n2345\n/work\n", result.err
    assert result.code == 7 and result.err == ""
    assert cli.leftovers() == []


def test_run_a_command_of_ones_own(cli: Cli, program, runtime):
    ref = program(Cmd=["/bin/false"], Env=["PATH=/bin"], User="55:66")
    result = cli("run", ref, "--", "sh", "-c", 'echo "$@"; id -u; id -g', "x", "-l", "--all")
    assert result.out == "-l --all\n55\n66\n"
    result = cli.any("run", ref, "--", "sh", "-c", "exit 255", env=runtime)
    assert result.code == 255
    result = cli("run", ref, "--", "sh", "-c", "echo 1 >/tmp/x && cat /tmp/x", env=runtime)
    assert result.out == "1\n"
    out = cli("run", ref, "--", "ls", "/tmp", env=runtime).out
    assert out == ""  # changes do not outlive their run
    devices = cli("run", ref, "--", "sh", "-c", "echo x >/dev/null && ls /proc/1", env=runtime)
    assert "status" in devices.out
    assert cli.leftovers() == []


def test_run_what_cannot_run(cli: Cli, program, runtime):
    ref = program(Env=["PATH=/bin"])
    assert "no command" in cli.fails(2, "run", ref, env=runtime)
    result = cli.any("run", ref, "--", "/no/such/program", env=runtime)
    assert result.code != 0 and "Traceback" not in result.err and result.err
    assert cli.leftovers() == []
    ref = program(Cmd=["/bin/true"], User="nobody-here")
    assert "nobody-here" in cli.fails(4, "run", ref, env=runtime)
    ref = program(Cmd=["/bin/true"], User="app:no-group")
    assert "no-group" in cli.fails(4, "run", ref, env=runtime, hint=False)
    ref = program(Cmd="not a list")
    assert "config.Cmd" in cli.fails(3, "run", ref, env=runtime, hint=False)
    assert cli.leftovers() == []


def test_run_an_image_of_another_machine(cli: Cli, tmp_path):
    write_layout(tmp_path / "layout", image(base_tar(), architecture="s390x", run={"Cmd": ["x"]}))
    cli.convert(f"oci:{tmp_path}/layout", "store:other")
    assert "s390x" in cli.fails(8, "run", "store:other", hint=False)
    assert cli.leftovers() == []
