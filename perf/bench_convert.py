"""Converting an image: time, CPU, memory and bytes, beside mksquashfs on the flattened tar.

Each round takes one sample of each, in this order:

  convert      oci layout -> fresh store
  mksquashfs   flattened tar -> squashfs, zstd level 3; the tar is made once, before all rounds
  gunzip       `cat layers | gunzip`: what mksquashfs is spared and the converter is not
  second       the second image, which shares all but one layer, into the same store
  again        the unchanged image once more

and then flatten and emit of a made-up image of --inodes inodes, in a fresh interpreter. Sources
are in the page cache; what was written is synced before each sample, outside of its time.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from harness.client import Client, blob_bytes
from harness.images import (
    Image,
    corpus_image,
    flattened_tar,
    image_or_demo,
    is_gzip,
    layer_tar_size,
)
from harness.options import parser, work_directory
from harness.processes import compile_bytecode, measured, probe
from harness.report import Report, Sample, tell

LIMIT_RSS = 300 << 20
LIMIT_AGAIN_S = 0.5
LIMIT_FLATTEN_S = 0.4
FLATTEN_LAYERS = 5


def main() -> None:
    found = parser(__doc__, runs=5)
    found.add_argument("--image", default="python-sci", help="of the corpus [python-sci]")
    found.add_argument("--second", help="shares all but one layer with it [IMAGE-v2]")
    found.add_argument("--inodes", type=int, default=50_000, help="of the made-up image [50000]")
    found.add_argument(
        "--option", action="append", default=[], help="handed to imgsnap convert, as --option=-j1"
    )
    arguments = found.parse_args()
    report = Report("convert", vars(arguments))
    image = image_or_demo(arguments.corpus, arguments.image)
    second = corpus_image(arguments.corpus, arguments.second or f"{image.name}-v2")
    if second is None:
        report.note(f"no second image for {image.name}: that figure is left out")
    report.note(f"image: {image.name}")
    compile_bytecode()
    with work_directory(arguments) as work:
        tell(f"convert: flattening {image.name} for mksquashfs")
        tar = flattened_tar(image, work)
        rounds = _Rounds(work, image, second, tar, arguments.option)
        report.interleave(arguments.runs, rounds.steps())
    _flatten(report, arguments)
    _figures(report, image, second)
    report.finish()


class _Rounds:
    """The steps of a round; they share the store that the first one makes."""

    def __init__(
        self, work: Path, image: Image, second: Image | None, tar: Path, options: list[str]
    ) -> None:
        self._work = work
        self._image = image
        self._second = second
        self._tar = tar
        self._options = options
        self._client = Client(work / "client")

    def steps(self) -> dict[str, Callable[[], Sample]]:
        steps: dict[str, Callable[[], Sample]] = {
            "convert": self._fresh,
            "mksquashfs": self._mksquashfs,
        }
        if all(is_gzip(path) for path in self._image.layer_files()):
            steps["gunzip"] = self._gunzip
        if self._second is not None:
            steps["second"] = lambda: self._convert(self._second, "second")
        steps["again"] = lambda: self._convert(self._image, "first")
        return steps

    def _fresh(self) -> Sample:
        shutil.rmtree(self._client.root, ignore_errors=True)
        self._client.root.mkdir()
        return self._convert(self._image, "first")

    def _convert(self, image: Image | None, tag: str) -> Sample:
        assert image is not None
        os.sync()
        usage, result = self._client.convert(image.source, f"store:perf:{tag}", *self._options)
        return usage.as_dict() | {"stored": blob_bytes(self._client.store), "report": result}

    def _mksquashfs(self) -> Sample:
        out = self._work / "squashfs"
        out.unlink(missing_ok=True)
        os.sync()
        command: list[str | Path] = [
            "mksquashfs",
            "-",
            out,
            "-tar",
            "-comp",
            "zstd",
            "-Xcompression-level",
            "3",
        ]
        with self._tar.open("rb") as source:
            usage = measured(command, stdin=source)
        return usage.as_dict() | {"stored": out.stat().st_size}

    def _gunzip(self) -> Sample:
        os.sync()
        script = 'cat "$@" | gunzip >/dev/null'
        return measured(["sh", "-c", script, "sh", *self._image.layer_files()]).as_dict()


def _flatten(report: Report, arguments: argparse.Namespace) -> None:
    tell(f"convert: flatten and emit {arguments.inodes} inodes")
    rounds = max(arguments.runs, 3)
    numbers = [str(arguments.inodes), str(FLATTEN_LAYERS), str(rounds)]
    result = json.loads(probe("flatten_probe", *numbers))
    report.samples["flatten"] = [{"cpu_s": value} for value in result["cpu_s"]]
    report.note(f"made-up image: {result['inodes']} inodes, {FLATTEN_LAYERS} layers")


def _figures(report: Report, image: Image, second: Image | None) -> None:
    wall, cpu = report.median("convert", "wall_s"), report.median("convert", "cpu_s")
    rival = "mksquashfs of the flattened tar"
    squash_wall = report.median("mksquashfs", "wall_s")
    squash_cpu = report.median("mksquashfs", "cpu_s")
    report.figure("convert, wall", wall, "s", rival, squash_wall, 1.0)
    report.figure("convert, CPU", cpu, "s", rival, squash_cpu)
    if "gunzip" in report.samples:
        gunzip = "gunzip of the layers, then mksquashfs"
        other = squash_wall + report.median("gunzip", "wall_s")
        report.figure("convert, wall", wall, "s", gunzip, other)
        other = squash_cpu + report.median("gunzip", "cpu_s")
        report.figure("convert, CPU", cpu, "s", gunzip, other)
    stored = report.median("convert", "stored")
    report.figure("stored", stored, "B", "the squashfs", report.median("mksquashfs", "stored"), 1.0)
    blobs = sum(layer["size"] for layer in image.layers())
    report.figure("stored", stored, "B", "the image's compressed layers", blobs)
    report.figure(
        "convert, peak RSS", report.median("convert", "max_rss"), "B", "limit", LIMIT_RSS, 1.0
    )
    if second is not None:
        share = _new_share(image, second)
        label = f"second image, wall ({share:.0%} of its bytes are new)"
        value = report.median("second", "wall_s")
        report.figure(label, value, "s", "that share of a fresh convert", wall * share, 1.0)
        report.figure("second image, wall", value, "s", "a fresh convert", wall)
        grown = report.median("second", "stored") - stored
        report.figure("second image, bytes added", grown, "B", "a fresh convert", stored)
    again = report.median("again", "wall_s")
    report.figure("unchanged image, wall", again, "s", "limit", LIMIT_AGAIN_S, 1.0)
    flatten = report.median("flatten", "cpu_s")
    report.figure("flatten + emit, CPU", flatten, "s", "limit", LIMIT_FLATTEN_S, 1.0)


def _new_share(image: Image, second: Image) -> float:
    """The share of the second image's uncompressed bytes that are in layers of its own."""
    known = {layer["digest"] for layer in image.layers()}
    sizes = {
        layer["digest"]: layer_tar_size(second.blob(layer["digest"])) for layer in second.layers()
    }
    return sum(size for digest, size in sizes.items() if digest not in known) / sum(sizes.values())


if __name__ == "__main__":
    main()
