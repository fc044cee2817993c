"""Calls to a block server."""

import time
from pathlib import Path
from typing import Any

from imgsnap.node import rpc
from imgsnap.node.attachments import Attachment
from imgsnap.node.request import AttachRequest

ATTACH_TIMEOUT_S = 300.0
CALL_TIMEOUT_S = 20.0
_SUPERVISOR_WAIT_S = 0.05


class BlockCalls:
    """The block server behind a socket, whichever of its lives answers."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    def call(self, operation: str, timeout_s: float = CALL_TIMEOUT_S, **args: Any) -> Any:
        """Waits for a supervisor that is being started; made again when a server dies over it."""
        deadline = time.monotonic() + CALL_TIMEOUT_S
        while True:
            try:
                return rpc.call_again(self._socket, operation, timeout_s=timeout_s, **args)
            except rpc.NobodyListens:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_SUPERVISOR_WAIT_S)

    def attach(
        self, request: AttachRequest, kind: str = "", timeout_s: float = ATTACH_TIMEOUT_S
    ) -> Attachment:
        """Opens a snapshot and has its device served. `kind` ends the attachment's id: see
        `attachments`."""
        return Attachment.from_json(self.call("attach", timeout_s, **request.to_json(), kind=kind))
