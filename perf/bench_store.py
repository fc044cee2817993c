"""The whole corpus in one store, beside the sum of its distinct compressed layers.

One row for each --chunk-size and --compression. Bytes are those of all blobs: packs, layer
indexes, metadata, maps, manifests, what a registry would hold. The bytes are the same in every
run; --runs only adds samples of CPU and time.
"""

import itertools
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from harness.client import Client, blob_bytes, tree_bytes
from harness.images import Image, corpus_image, corpus_names, demo_image
from harness.options import parser, work_directory
from harness.processes import compile_bytecode
from harness.report import Report, Sample, shown, tell

AIM = 0.76


def main() -> None:
    found = parser(__doc__, runs=1)
    found.add_argument("--images", nargs="+", metavar="NAME", help="of the corpus [all]")
    found.add_argument(
        "--chunk-size", nargs="+", default=["128KiB", "256KiB"], help="[128KiB 256KiB]"
    )
    found.add_argument("--compression", nargs="+", default=["zstd:3"], help="[zstd:3]")
    arguments = found.parse_args()
    report = Report("store", vars(arguments))
    images = _images(arguments.corpus, arguments.images)
    report.note("images: " + ", ".join(image.name for image in images))
    layers = {layer["digest"]: int(layer["size"]) for image in images for layer in image.layers()}
    report.samples["layers"] = [{"digest": digest, "size": size} for digest, size in layers.items()]
    report.note(f"{len(layers)} distinct layers")
    choices = list(itertools.product(arguments.chunk_size, arguments.compression))
    compile_bytecode()
    with work_directory(arguments) as work:
        steps: dict[str, Callable[[], Sample]] = {
            f"chunks {chunk}, {compression}": partial(
                _convert_all, work, images, chunk, compression
            )
            for chunk, compression in choices
        }
        report.interleave(arguments.runs, steps)
    total = sum(layers.values())
    for label in steps:
        stored = report.median(label, "stored")
        report.figure(f"store, {label}", stored, "B", "distinct compressed layers", total, AIM)
    for label in steps:
        cpu, first = report.median(label, "cpu_s"), next(iter(steps))
        report.figure(f"CPU, {label}", cpu, "s", first, report.median(first, "cpu_s"))
        index = report.median(label, "chunk_index")
        report.note(f"{label}: chunk index {shown(index, 'B')}, local only, not counted")
    report.finish()


def _images(corpus: Path, names: list[str] | None) -> list[Image]:
    found = [corpus_image(corpus, name) for name in names or corpus_names(corpus)]
    images = [image for image in found if image is not None]
    if not images:
        tell(f"there is no such image in {corpus}: using the project's demo image")
        return [demo_image()]
    if len(images) < len(found):
        raise SystemExit(f"error: not all of {names} are in {corpus}")
    return images


def _convert_all(work: Path, images: list[Image], chunk: str, compression: str) -> Sample:
    client = Client(work / "client")
    shutil.rmtree(client.root, ignore_errors=True)
    client.root.mkdir()
    os.sync()
    options = ("--chunk-size", chunk, "--compression", compression)
    wall = cpu = 0.0
    rss, after = 0, {}
    for image in images:
        usage, _ = client.convert(image.source, f"store:{image.name}:perf", *options)
        wall, cpu, rss = wall + usage.wall_s, cpu + usage.cpu_s, max(rss, usage.max_rss)
        after[image.name] = blob_bytes(client.store)
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "max_rss": rss,
        "stored": blob_bytes(client.store),
        "stored_after": after,
        "chunk_index": tree_bytes(client.store / "imgsnap"),
    }


if __name__ == "__main__":
    main()
