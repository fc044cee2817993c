"""The node daemon's calls: what can be asked at the control socket, and who answers it.

It keeps nothing in memory that is not on disk: it may end at any moment and be started again, and
what is mounted does not notice.
"""

import os
import time
from pathlib import Path
from typing import Any

from imgsnap import __version__
from imgsnap.errors import Unavailable
from imgsnap.mount import linux
from imgsnap.mount.process import ProcessId
from imgsnap.node import rpc
from imgsnap.node.block_calls import CALL_TIMEOUT_S, BlockCalls
from imgsnap.node.mounting import Mounting
from imgsnap.node.places import NodePlaces
from imgsnap.node.policies import DaemonPolicy
from imgsnap.node.users import Users
from imgsnap.node.vmm_attach import VmmAttach


class Control:
    """The operations behind the control socket. Safe for threads."""

    def __init__(self, run_dir: Path, cache_dir: Path, policy: Path | None = None) -> None:
        """`policy` is a file that everything opened here must be accepted by."""
        self.places = NodePlaces(run_dir)
        self._cache_dir = cache_dir
        self._started = time.time()
        self._known_supervisor: ProcessId | None = None
        block = BlockCalls(self.places.server.block_socket)
        users = self._users = Users(self.places, block)
        self._policy = DaemonPolicy(policy)
        self.mounting = Mounting(
            self.places, cache_dir, block, users, self._supervisor_process, self._policy
        )
        self._vmm = VmmAttach(self.places, block, users, self._policy)

    def handlers(self) -> dict[str, rpc.Handler]:
        return {
            "status": self.status,
            "place": self.place,
            "mount": self.mounting.mount,
            "umount": self.mounting.umount,
            "attach": self._vmm.attach,
            "detach": self._vmm.detach,
            "release": self._vmm.release,
            "attachments": self._vmm.attachments,
        }

    def status(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answers without looking at what is mounted: in milliseconds, however much that is."""
        return {
            "pid": os.getpid(),
            "version": __version__,
            "started": self._started,
            "supervisor": self._supervisor(),
            "policy": str(self._policy.path) if self._policy.path else None,
            **self.place({}),
        }

    def place(self, args: dict[str, Any]) -> dict[str, Any]:
        """What a command must know before it asks for a mount; asks nobody."""
        return {"cache": str(self._cache_dir), "namespace": linux.mount_namespace()}

    def _supervisor(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = rpc.call(
                self.places.server.supervisor_socket, "status", timeout_s=CALL_TIMEOUT_S
            )
        except Unavailable:
            return None
        return found

    def look_after(self) -> None:
        """What is to be done every few seconds."""
        self._users.forget_dead_processes()

    def know_supervisor(self) -> None:
        """Asks for the supervisor's process, so that the first mount need not."""
        self._supervisor_process()

    def _supervisor_process(self) -> ProcessId | None:
        """It is asked once in its life: a mount need not wait for it."""
        known = self._known_supervisor
        if known is None or not known.alive:
            status = self._supervisor()
            known = ProcessId.of(int(status["pid"])) if status is not None else None
            self._known_supervisor = known
        return known
