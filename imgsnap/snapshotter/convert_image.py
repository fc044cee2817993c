"""One conversion on first use, as a process: `python -m imgsnap.snapshotter.convert_image`.

It reads a Request from standard input, converts the image as `imgsnap convert` does, and publishes
the snapshot as a referrer in the image's own repository. Its exit codes are the command line's.
"""

import contextlib
import json
import os
import signal
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

from imgsnap.blockstore.chunk_index import ChunkIndex
from imgsnap.convert.limits import Limits
from imgsnap.convert.pipeline import Options
from imgsnap.convert.progress import Silent
from imgsnap.convert.publish import publish
from imgsnap.convert.source import select_images
from imgsnap.errors import ImgsnapError
from imgsnap.node.source import Source
from imgsnap.oci.locate import open_repository
from imgsnap.oci.reference import parse_location
from imgsnap.oci.repository import Repository, WritableRepository
from imgsnap.snapshotter.conversion_request import Request

NICE = 19
"""The kernel gives I/O by it as well."""
OOM_SCORE = 500
"""The snapshotter's own is as low as can be, and what it starts would have that."""


def convert(request: Request) -> None:
    """Raises ImgsnapError; AccessDenied when the node's credentials may not push."""
    limits = Limits()
    with ExitStack() as stack:
        origin = stack.enter_context(closing(_open(request.source, writable=False)))
        target = stack.enter_context(closing(_open(request.source, writable=True)))
        images = select_images(origin, request.manifest, (), limits)
        index = stack.enter_context(ChunkIndex(request.chunk_index))
        publish(
            origin,
            images,
            cast("WritableRepository", target),
            request.tag,
            index,
            Options(request.work_dir, jobs=1, limits=limits),
            Silent(),
        )


def _open(source: Source, *, writable: bool) -> Repository:
    repository, _ = open_repository(
        parse_location(source.location),
        source.options,
        store=source.store,
        environ={**os.environ, **dict(source.environ)},
        create=writable,
    )
    return repository


def main() -> int:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.nice(NICE)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    try:
        convert(Request.from_json(json.load(sys.stdin)))
    except ImgsnapError as error:
        sys.stderr.write(f"{error}" + (f" ({error.hint})" if error.hint else "") + "\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
