"""imgsnap convert"""

import json
import os
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from imgsnap.errors import InvalidArgument
from imgsnap.units import format_size, parse_size
from imgsnap_cli.output import SCHEMA, print_table
from imgsnap_cli.places import Places, registry_flags
from imgsnap_cli.progress import make_progress, progress_option
from imgsnap_cli.settings import Settings


@click.command(short_help="Convert an OCI image to a snapshot")
@click.argument("source")
@click.argument("target")
@click.option("--platform", "platforms", multiple=True, metavar="OS/ARCH", help="May be repeated")
@click.option("--all-platforms", is_flag=True, help="Every image of an index")
@click.option(
    "--as",
    "form",
    type=click.Choice(["snapshot", "image"]),
    default="snapshot",
    show_default=True,
    help="What TARGET is: the snapshot, or an image that containerd runs from it",
)
@click.option("--verity", is_flag=True, help="Add a dm-verity hash tree, by which guests verify")
@click.option(
    "--reuse",
    multiple=True,
    metavar="REPOSITORY",
    help="Take converted layers and packs from here too",
)
@click.option("--compression", default="zstd:3", show_default=True, metavar="zstd:LEVEL")
@click.option("--chunk-size", default="256KiB", show_default=True, help="Target size of a chunk")
@click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Threads [all processors]")
@click.option("--work-dir", metavar="DIR", help="For decompressed layers [TMPDIR, /var/tmp]")
@click.option("--limit", "limits", multiple=True, metavar="NAME=VALUE", help="Raise a limit")
@click.option("--absolute-names", is_flag=True, help="Take /name in layers as name, as tar -P")
@click.option("--force", is_flag=True, help="Convert although the target is up to date")
@click.option("--report", metavar="FILE", help="Write a JSON report")
@progress_option
@registry_flags
@click.pass_obj
def command(
    settings: Settings,
    /,
    source: str,
    target: str,
    platforms: tuple[str, ...],
    all_platforms: bool,
    form: str,
    verity: bool,
    reuse: tuple[str, ...],
    compression: str,
    chunk_size: str,
    jobs: int | None,
    work_dir: str | None,
    limits: tuple[str, ...],
    absolute_names: bool,
    force: bool,
    report: str | None,
    progress: str,
    **flags: Any,
) -> None:
    """Convert the image SOURCE to a snapshot and store it as TARGET.

    \b
    imgsnap convert registry.example/app:1.0 registry.example/app:1.0-imgsnap
    imgsnap convert oci-archive:app.tar store:app:1.0
    imgsnap convert --all-platforms docker.io/library/nginx:1.27 store:nginx:1.27
    imgsnap convert --as image registry.example/app:1.0 registry.example/app:1.0-fast

    Layers that TARGET holds converted are neither downloaded nor converted again; chunks that it
    holds are not stored again. The snapshot becomes visible when it is complete.
    """
    from imgsnap.blockstore.chunk_index import ChunkIndex
    from imgsnap.convert.publish import publish
    from imgsnap.convert.source import select_images
    from imgsnap.oci.platforms import parse_platform
    from imgsnap.oci.published import Form

    started = time.monotonic()
    if platforms and all_platforms:
        raise InvalidArgument("--platform and --all-platforms exclude each other")
    options = replace(
        _options(settings, compression, chunk_size, jobs, work_dir, limits),
        strip_root=absolute_names,
        verity=verity,
    )
    wanted = [parse_platform(text) for text in platforms]
    places = Places(settings, flags)
    with ExitStack() as stack:
        origin, reference = places.reader(stack, source)
        destination, tag = places.writer(stack, target)
        others = [places.reader(stack, text)[0] for text in reuse]
        images = select_images(origin, reference, wanted, options.limits, every=all_platforms)
        index = stack.enter_context(ChunkIndex(places.chunk_index_path(target)))
        result = publish(
            origin,
            images,
            destination,
            tag,
            index,
            options,
            make_progress(progress),
            form=Form.INDEX if all_platforms and form == "snapshot" else Form(form),
            force=force,
            reuse=others,
        )
    seconds = time.monotonic() - started
    _print(target, result, seconds)
    if report:
        _write_report(Path(report), source, target, result, seconds)


def _options(
    settings: Settings,
    /,
    compression: str,
    chunk_size: str,
    jobs: int | None,
    work_dir: str | None,
    limits: tuple[str, ...],
) -> Any:
    from imgsnap.convert.limits import Limits
    from imgsnap.convert.pipeline import Options

    algorithm, _, level = compression.partition(":")
    if algorithm != "zstd" or not (level or "3").isdigit() or not 1 <= int(level or 3) <= 19:
        raise InvalidArgument(
            f"compression {compression!r} is unknown", hint="zstd:LEVEL with LEVEL from 1 to 19"
        )
    try:
        target = parse_size(chunk_size)
    except ValueError as error:
        raise InvalidArgument(f"--chunk-size: {error}") from error
    rules = _rules(target)
    bounds = Limits()
    for text in limits:
        bounds = bounds.with_text(text)
    directory = work_dir or settings.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108
    return Options(
        work_dir=Path(directory),
        rules=rules,
        level=int(level or 3),
        jobs=jobs or len(os.sched_getaffinity(0)),
        limits=bounds,
    )


def _rules(chunk_target: int) -> Any:
    from imgsnap.errors import UnsupportedFormat
    from imgsnap.formats.rules import Rules

    try:
        return Rules(
            chunk_target=chunk_target, chunk_min=chunk_target // 4, chunk_max=chunk_target * 2
        )
    except UnsupportedFormat as error:
        raise InvalidArgument(
            f"--chunk-size: {error}", hint="a multiple of 16KiB, for example 128KiB"
        ) from error


def _print(target: str, result: Any, seconds: float) -> None:
    digest = result.manifest.descriptor.digest
    if not result.images:
        click.echo(f"{target} is up to date: {digest}")
        return
    for image in result.images:
        rows = [
            (
                layer.diff_id[7:19],
                "reused" if layer.reused else "converted",
                format_size(layer.extent),
                layer.chunks,
                layer.new_chunks,
                format_size(layer.stored),
            )
            for layer in image.layers
        ]
        if len(result.images) > 1:
            click.echo(f"{image.platform}: {image.snapshot.manifest.descriptor.digest}")
        print_table(("LAYER", "", "SIZE", "CHUNKS", "NEW", "STORED"), rows)
        if image.snapshot.config.root_hash is not None:
            click.echo(f"dm-verity root hash {image.snapshot.config.root_hash}")
    click.echo(f"{target}@{digest} in {seconds:.1f} s")


def _write_report(path: Path, source: str, target: str, result: Any, seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    value = {
        "schema": SCHEMA,
        "source": source,
        "target": target,
        "digest": result.manifest.descriptor.digest,
        "upToDate": not result.images,
        "seconds": round(seconds, 3),
        "cpuSeconds": round(usage.ru_utime + usage.ru_stime, 3),
        "maxRSS": _peak_memory(),
        "images": [
            {
                "platform": image.platform,
                "digest": image.snapshot.manifest.descriptor.digest,
                "config": image.snapshot.config.source_config,
                "inodes": image.snapshot.config.inode_count,
                "deviceSize": image.snapshot.config.device_blocks * 4096,
                "rootHash": image.snapshot.config.root_hash,
                "metadataStored": image.snapshot.metadata_stored,
                "chunkMapStored": image.snapshot.chunk_map_stored,
                "seconds": round(image.seconds, 3),
                "mergeCPUSeconds": round(image.flatten_cpu_s, 3),
                "layers": [asdict(layer) for layer in image.layers],
            }
            for image in result.images
        ],
    }
    path.write_text(json.dumps(value, indent=2) + "\n")


def _peak_memory() -> int:
    """Bytes. Not getrusage's: that begins with the peak of the process that started this one."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
