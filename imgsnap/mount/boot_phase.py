"""The kernel's readahead on a mount that starts from a boot pack: none, until the start is over.

A boot pack has the blocks that a start reads and not those around them. A request of the kernel
that reads ahead mixes both and cannot be answered from the pack. The device file is opened for
direct I/O, so only EROFS's own readahead counts, and that can be changed at any time for files that
are opened later.
"""

import logging
from typing import TYPE_CHECKING

from imgsnap.mount import attach

if TYPE_CHECKING:
    from imgsnap.blockstore.boot_stream import BootLoader

READ_AHEAD_AFTER_KB = 128
"""The kernel's default."""

_log = logging.getLogger(__name__)


class BootPhase:
    """Ask `check` every few seconds; it ends the phase once the pack is no longer used."""

    def __init__(self, boot: "BootLoader", bdi: str) -> None:
        """`bdi` is that of the mounted EROFS."""
        self._boot = boot
        self._bdi = bdi
        self._served = -1
        self._over = False
        attach.set_readahead(bdi, 0)

    def check(self) -> bool:
        """Raises the readahead when the stream has ended and nothing was read from the pack since
        the last call; True when that is done."""
        served = self._boot.buffer.counts.served
        if self._over or not self._boot.ended or served != self._served:
            self._served = served
            return self._over
        self._over = True
        attach.set_readahead(self._bdi, READ_AHEAD_AFTER_KB)
        _log.info("the start is over; pack: %s", self._boot.buffer.counts.as_dict())
        return True
