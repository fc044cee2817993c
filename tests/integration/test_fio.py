"""fio reads what fio wrote, through a mounted snapshot and through an attached file.

Every block that fio writes has a checksum and its offset in it; each way of reading that the kernel
offers has to bring the same. It stands where pjdfstest, xfstests and ltp would: Debian has none of
them, and of read-only file systems they test little.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.cli import Cli
from tests.support.image_builder import image, write_layout
from tests.support.node import Node, node_daemon, wait_for
from tests.support.tars import Item, layer_tar

pytestmark = pytest.mark.root

SIZE = 24 << 20
READS = ("--readonly", "--rw=randread", "--verify_fatal=1", "--iodepth=8")
VERIFIED = (f"--size={SIZE}", "--verify=crc32c", "--verify_interval=4k")
ENGINES = ("psync", "pvsync2", "mmap", "libaio", "io_uring", "posixaio", "splice")
DIRECT_ENGINES = ("psync", "libaio", "io_uring")


def fio(directory: Path, *options: str) -> subprocess.CompletedProcess:
    assert shutil.which("fio"), "fio is not installed: scripts/setup .venv tests"
    command = ["fio", "--name=blocks", *VERIFIED, *options]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)


@pytest.fixture
def node(cli: Cli):
    with node_daemon(cli) as running:
        yield running


def written(cli: Cli, work: Path, offset: int = 0) -> bytes:
    """What fio wrote at this offset of a file: now the file `data` of the snapshot store:app."""
    options = ("--filename=data", f"--offset={offset}", "--bs=4k", "--rw=write", "--do_verify=0")
    wrote = fio(work, *options)
    assert wrote.returncode == 0, wrote.stderr
    content = (work / "data").read_bytes()[offset:]
    write_layout(work / "image", image(layer_tar([Item(b"data", content=content)])))
    cli.convert(f"oci:{work}/image", "store:app")
    return content


@pytest.mark.parametrize("size", ["4k", "64k", "1m"])
def test_every_engine_reads_a_mounted_file(node: Node, cli: Cli, tmp_path, size):
    written(cli, tmp_path)
    tree = tmp_path / "tree"
    cli("mount", "store:app", tree)
    try:
        for engine in ENGINES:
            options = (f"--filename={tree}/data", f"--bs={size}", f"--ioengine={engine}")
            done = fio(tmp_path, *READS, *options)
            assert done.returncode == 0, (engine, done.stderr)
    finally:
        cli("umount", tree)


def test_direct_reads_of_an_attached_file_while_servers_die(node: Node, cli: Cli, tmp_path):
    offset = 4096  # of the only file's data in the device; fio wants to find it where it wrote it
    data = written(cli, tmp_path, offset)
    path = Path(cli("attach", "store:app").out.strip())
    assert path.read_bytes().index(data) == offset
    place = (f"--filename={path}", f"--offset={offset}", "--direct=1")
    for engine in DIRECT_ENGINES:
        node.kill(wait_for(node.server, "a server"))
        done = fio(tmp_path, *READS, *place, "--bs=64k", f"--ioengine={engine}")
        assert done.returncode == 0, (engine, done.stderr)
    (tmp_path / "moved").write_bytes(path.read_bytes()[4096:])
    wrong = fio(tmp_path, *READS, "--filename=moved", f"--offset={offset}", "--bs=4k")
    assert wrong.returncode and "verify" in wrong.stderr, "it sees another block's bytes"
    wait_for(node.server, "the next server")
    cli("detach", path)
