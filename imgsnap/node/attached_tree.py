"""Mounting an attachment's EROFS, with the readahead that suits what has to be fetched."""

import logging
import threading
from pathlib import Path

from imgsnap.errors import ImgsnapError
from imgsnap.mount import attach
from imgsnap.mount.attach import ErofsMount
from imgsnap.mount.boot_phase import READ_AHEAD_AFTER_KB
from imgsnap.node import rpc
from imgsnap.node.attachments import Attachment
from imgsnap.node.block_calls import CALL_TIMEOUT_S
from imgsnap.node.places import ServerPlaces

_log = logging.getLogger(__name__)


def mount_attached(places: ServerPlaces, attachment: Attachment, target: Path) -> ErofsMount:
    """Mounts the device on a directory.

    For a start from a boot pack, and to record one, the kernel must ask for what is read and no
    more: a request that reads ahead of it is none that the pack can answer. The block server lifts
    this when the start is over.
    """
    local = attach.READ_AHEAD_LOCAL_KB if attachment.local else attach.READ_AHEAD_LAZY_KB
    attach.tune_readahead(places.device_dir, local)  # EROFS takes what is set when it opens
    device = places.device(attachment.id)
    mounted = attach.mount_erofs(device, target, find_bdi=attachment.exact)
    if mounted.bdi:
        attach.set_readahead(mounted.bdi, 0)
        # The start need not wait for this, only this process's end.
        arguments = (places.block_socket, attachment.id, mounted.bdi)
        threading.Thread(target=_announce, args=arguments, name="starting").start()
    return mounted


def _announce(block_socket: Path, attachment_id: str, bdi: str) -> None:
    """Has the block server lift the readahead when the start is over."""
    try:
        rpc.call_again(
            block_socket, "starting", timeout_s=CALL_TIMEOUT_S, id=attachment_id, bdi=bdi
        )
    except ImgsnapError as error:  # its server was replaced: nobody would lift it later
        _log.info("the start of %s is not waited for: %s", attachment_id, error)
        attach.set_readahead(bdi, READ_AHEAD_AFTER_KB)
