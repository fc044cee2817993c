"""The ways of one snapshot's device to its readers, in one guest under emulation:

  virtio-blk   a plain file of the host as a disk: no server of ours
  loop         a file in the guest's memory below a loop device
  ublk         `imgsnap attach --via ublk`
  FUSE file    `imgsnap attach`
  …, page cache   a loop device over one of these two, as a VMM reads them

Sequential reads of 512 KiB and single 4 KiB reads at random, past the page cache and through it, a
cold walk through all files of a mounted EROFS, and the pause when the block server is killed.
Everything is in the node cache. Only the ratios mean something. Needs root, and what
tests/support/guest.py needs; PYTHONPATH as `perf/README.md` has it.
"""

import json
import os
import sysconfig
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

from harness.options import parser, skip, work_directory
from harness.report import Report, tell

from tests.support.cli import Cli
from tests.support.guest import find_kit, running_guest
from tests.support.guest_image import PYTHON, python_image
from tests.support.image_builder import image, write_layout
from tests.support.node import node_daemon

PROBE = Path(__file__).parent / "harness/ublk_probe.py"
TREE_MAX = 25 << 20
SKIPPED = ("__pycache__", "test", "site-packages", "lib-dynload")


def main() -> None:
    found = parser(__doc__, runs=3)
    found.add_argument(
        "--cpus",
        type=int,
        default=1,
        help="of the guest: with more, the emulator disturbs itself [1]",
    )
    arguments = found.parse_args()
    if os.geteuid() != 0:
        raise skip("attaching needs root")
    kit = find_kit()
    if isinstance(kit, str):
        raise skip(kit)
    report = Report("ublk", vars(arguments))
    with work_directory(arguments) as work:
        inner, outer = Cli(work / "inner"), Cli(work / "outer")
        raw = work / "tree.raw"
        tell("ublk: converting the images")
        write_layout(work / "tree", image(_tree(), compression=""))
        inner.convert(f"oci:{work}/tree", "store:tree")
        with node_daemon(inner):
            raw.write_bytes(Path(inner("attach", "store:tree").out.strip()).read_bytes())
        files = {"srv/ublk_probe.py": PROBE.read_bytes(), "srv/tree.raw": raw.read_bytes()}
        write_layout(work / "guest", python_image(inner.store, files))
        outer.convert(f"oci:{work}/guest", "store:guest")
        with node_daemon(outer):
            disk = Path(outer("attach", "store:guest").out.strip())
            modules = ["ublk_drv", "loop"]
            with running_guest(
                kit, [disk, raw], modules=modules, memory_mib=768, cpus=arguments.cpus
            ) as guest:
                command = f"{PYTHON} /srv/ublk_probe.py {arguments.runs}"
                said = guest.check(command, limit_s=60 + 90 * arguments.runs)
    _report(report, json.loads(said.rpartition("PROBE ")[2]))
    report.finish()


def _tree() -> bytes:
    """A layer of many small files: the standard library."""
    root, size, buffer = Path(sysconfig.get_path("stdlib")), 0, BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.suffix == ".py" and not set(inside.parts) & set(SKIPPED) and size < TREE_MAX:
                tar.add(path, arcname=str(inside))
                size += path.stat().st_size
    return buffer.getvalue()


def _report(report: Report, found: dict[str, list[Any]]) -> None:
    report.samples.update(found)
    for label in found:
        load, _, _ = label.partition("/")
        other = report.median(f"{load}/ublk", "s")
        report.figure(label.replace("/", ": "), report.median(label, "s"), "s", "ublk", other)
        if load == "walk":
            report.note(f"{label}: {found[label][-1]}")


if __name__ == "__main__":
    main()
