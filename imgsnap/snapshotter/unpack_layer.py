"""One layer of an ordinary image, fetched, verified and unpacked for overlayfs.

The blob is spooled as a tar and both digests are checked before the first file is written, so the
directory never holds a byte that the image's author did not sign for. It still has to be thrown
away by the caller when this fails half-way: give it a temporary name, and rename it afterwards.
"""

import errno
import os
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from imgsnap.convert.ingest import LayerSource, index_tar, spool
from imgsnap.convert.limits import Limits
from imgsnap.errors import ImgsnapError, InvalidArgument, ResourceExhausted
from imgsnap.formats.rules import Rules
from imgsnap.oci.repository import Descriptor
from imgsnap.snapshotter.find_image import OpenRepository
from imgsnap.snapshotter.image_labels import registry_location
from imgsnap.snapshotter.layer_tree import write_layer
from imgsnap.snapshotter.seams import ImageLayer


@dataclass(frozen=True, slots=True)
class Unpacker:
    """The implementation of `LayerUnpacker`. Safe for threads; each call is on its own."""

    open_repository: OpenRepository
    work_dir: Path  # for one decompressed tar per call
    limits: Limits = field(default_factory=Limits)

    def unpack(
        self, repository: str, layer: ImageLayer, directory: Path, lowers: Sequence[Path]
    ) -> None:
        """See `LayerUnpacker.unpack`. Raises InvalidArgument for a directory that is not empty,
        what the repository raises, DigestMismatch, and what reading and writing a layer raise."""
        try:
            if any(directory.iterdir()):
                raise InvalidArgument(f"{directory} is not empty")
            self.work_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.work_dir, prefix="layer-") as scratch:
                self._unpack(repository, layer, directory, lowers, Path(scratch) / "tar")
        except OSError as error:
            raise _unpack_error(layer, error) from error

    def _unpack(
        self,
        repository: str,
        layer: ImageLayer,
        directory: Path,
        lowers: Sequence[Path],
        tar: Path,
    ) -> None:
        descriptor = Descriptor(layer.media_type, layer.digest, layer.size)
        source = LayerSource(descriptor, layer.diff_id)
        with closing(self.open_repository(registry_location(repository))) as place:
            spool(place, source, tar, self.limits, lambda count: None)
        # Absolute names are taken as relative, as containerd does: the image may have been
        # converted with --absolute-names, and nothing is written outside the directory anyway.
        built = index_tar(tar, source, Rules(), self.limits, strip_root=True)
        fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        try:
            write_layer(built, fd, directory, lowers)
        finally:
            os.close(fd)


def _unpack_error(layer: ImageLayer, error: OSError) -> ImgsnapError:
    problem = f"cannot unpack layer {layer.digest}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceExhausted(problem, hint="the snapshotter's directory needs room")
    return ImgsnapError(problem)
