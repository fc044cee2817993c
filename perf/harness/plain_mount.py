"""An EROFS image file mounted as the kernel does it alone: no FUSE, no process of ours."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def erofs(image: Path, target: Path) -> Iterator[str]:
    """Yields the loop device below, or "" when the kernel reads the file itself."""
    from imgsnap.mount import attach

    target.mkdir(exist_ok=True)
    mounted = attach.mount_erofs(image, target)
    try:
        yield mounted.loop
    finally:
        attach.unmount(target, retry=True)
        target.rmdir()
