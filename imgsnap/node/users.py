"""Who uses an attachment: an empty file each, so that whoever comes next can count them."""

import contextlib
import threading
from collections.abc import Iterator

from imgsnap.errors import Busy, ImgsnapError, NotFound
from imgsnap.mount import attach
from imgsnap.mount.process import ProcessId
from imgsnap.node.block_calls import BlockCalls
from imgsnap.node.places import NodePlaces

BY_HAND = "attached"
"""The user that stands for `imgsnap attach`: until `imgsnap detach`."""
_PROCESS = "process-"
"""Begins the user that stands for a process: for as long as that lives. Any other is a mount's
instance."""


def process_user(process: ProcessId) -> str:
    return f"{_PROCESS}{process.pid}-{process.start_time}"


def process_lives(user: str) -> bool:
    """Whether a user is a process, and that lives."""
    pid, _, start_time = user.removeprefix(_PROCESS).partition("-")
    known = user.startswith(_PROCESS) and pid.isdigit() and start_time.isdigit()
    return known and ProcessId(int(pid), int(start_time)).alive


class Users:
    """The users of all attachments of a node. Safe for threads; one process changes them."""

    def __init__(self, places: NodePlaces, block: BlockCalls) -> None:
        self._places = places
        self._block = block
        self._locks_lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One at a time for an attachment's id, or a user."""
        with self._locks_lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def join(self, attachment_id: str, user: str) -> None:
        """To be called with the attachment's lock."""
        users = self._places.users(attachment_id)
        users.mkdir(parents=True, exist_ok=True, mode=0o700)
        (users / user).touch()

    def of(self, attachment_id: str) -> list[str]:
        try:
            return [path.name for path in self._places.users(attachment_id).iterdir()]
        except FileNotFoundError:  # the last one may leave at any moment
            return []

    def all(self) -> list[tuple[str, str]]:
        """Attachments' ids and their users."""
        return [(found, user) for found in self.of("") for user in self.of(found)]

    def leave(self, attachment_id: str, user: str, *, lazy: bool) -> None:
        """With the last user the attachment goes. Raises Busy for a disk that is in use, unless
        `lazy`: then all is as it was."""
        with self.lock(attachment_id):
            users = self._places.users(attachment_id)
            (users / user).unlink(missing_ok=True)
            try:
                users.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return  # others use it
            tree = self._places.tree(attachment_id)
            with contextlib.suppress(NotFound):  # the directory could not even be made
                attach.unmount(tree, lazy=lazy, retry=True)
            attach.remove_directory(tree)
            try:
                self._block.call("detach", id=attachment_id, lazy=lazy)
            except NotFound:
                pass
            except Busy:
                self.join(attachment_id, user)
                raise

    def release(self, user: str) -> None:
        """Takes away what a user has, after what it asks for at this moment."""
        with self.lock(user):
            for attachment_id, name in self.all():
                if name == user:
                    self.leave(attachment_id, user, lazy=True)
        with self._locks_lock:
            self._locks.pop(user, None)

    def forget_dead_processes(self) -> None:
        """Takes away what processes had that have ended without a word. Call it every few seconds;
        what cannot be done now is tried at the next call."""
        for attachment_id, user in self.all():
            if user.startswith(_PROCESS) and not process_lives(user):
                with contextlib.suppress(ImgsnapError, OSError):
                    self.leave(attachment_id, user, lazy=True)

    def forget_unknown(self, mounts: set[str]) -> None:
        """Takes back what no mount, process or `imgsnap attach` stands behind."""
        for attachment_id, user in self.all():
            if user not in mounts and user != BY_HAND and not process_lives(user):
                with contextlib.suppress(ImgsnapError, OSError):
                    self.leave(attachment_id, user, lazy=True)
