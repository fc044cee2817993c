"""Attaching for VMMs: a snapshot's device as a file or a disk that others read."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from imgsnap.errors import Busy, InvalidArgument, NotFound
from imgsnap.mount.attach import READ_AHEAD_EXACT_KB, READ_AHEAD_LAZY_KB, tune_readahead
from imgsnap.mount.process import ProcessId, processes_with_open
from imgsnap.node.attachments import DISK, UBLK
from imgsnap.node.block_calls import BlockCalls
from imgsnap.node.devices import DEVICE_ALIGNMENT
from imgsnap.node.places import NodePlaces
from imgsnap.node.policies import DaemonPolicy
from imgsnap.node.request import AttachRequest
from imgsnap.node.users import BY_HAND, Users, process_lives, process_user
from imgsnap.units import align_up

_ATTEMPTS = 3
"""At an attachment whose last user goes at the same time."""


class VmmAttach:
    """The control process's calls for VMMs. Safe for threads."""

    def __init__(
        self, places: NodePlaces, block: BlockCalls, users: Users, policy: DaemonPolicy
    ) -> None:
        self._places = places
        self._policy = policy
        self._block = block
        self._users = users

    def attachments(self, args: dict[str, Any]) -> list[dict[str, Any]]:
        """Every attachment, mounts' too, with the number of its users."""
        found: list[dict[str, Any]] = self._block.call("list")
        for attachment in found:
            users = self._users.of(attachment["id"])
            attachment |= {
                "users": len(users),
                "attached": BY_HAND in users,
                "path": str(self._path(attachment["id"]) or ""),
                "device_size": align_up(attachment["size"], DEVICE_ALIGNMENT),
            }
        return found

    def attach(self, args: dict[str, Any]) -> dict[str, Any]:
        """Serves a snapshot's device as a file for VMMs, or `via` ublk as a disk (`number`, if it
        is to be a certain one), until `detach`; as `attachments` has it.

        Once for all of them: who attaches it again gets the same file. With `process` (pid and
        start time) for that process alone: until `release`, or the end of the process.
        """
        user = _user(args)
        if user == BY_HAND:
            return self._attach(user, args)
        with self._users.lock(user):  # a release waits for this
            attached = self._attach(user, args)
            if not process_lives(user):  # it asks for no release any more
                self._users.leave(attached["id"], user, lazy=True)
            return attached

    def _attach(self, user: str, args: dict[str, Any]) -> dict[str, Any]:
        request, ublk = AttachRequest.from_json(args), args.get("via") == "ublk"
        request = self._policy.bind(request)
        if ublk:
            from imgsnap.ublk.control import check_driver

            check_driver()
        request = replace(request, read=replace(request.read, disk=True))
        for _ in range(_ATTEMPTS):
            attachment = self._block.attach(request, UBLK if ublk else DISK)
            with self._users.lock(attachment.id):
                if ublk:
                    with contextlib.suppress(NotFound):  # detached between the two
                        self._block.call("publish", id=attachment.id, number=args.get("number"))
                path = self._path(attachment.id)
                if path is not None and path.exists():
                    if not ublk:
                        exact = attachment.exact
                        tune_readahead(path, READ_AHEAD_EXACT_KB if exact else READ_AHEAD_LAZY_KB)
                    self._users.join(attachment.id, user)
                    size = align_up(attachment.size, DEVICE_ALIGNMENT)
                    return {**attachment.to_json(), "path": str(path), "device_size": size}
        raise Busy(f"{request.reference} is being detached by others")

    def detach(self, args: dict[str, Any]) -> None:
        """Takes an attached device's file or disk away. Raises NotFound; Busy while it is open,
        unless `lazy`: who has it open then reads on."""
        attachment_id, lazy = str(args["id"]), bool(args.get("lazy"))
        if "/" in attachment_id or BY_HAND not in self._users.of(attachment_id):
            raise NotFound(f"{attachment_id[:100]} is not attached", hint="imgsnap attachments")
        if not attachment_id.endswith(UBLK):  # of a disk the kernel tells more
            device = self._places.server.device(attachment_id)
            processes = [] if lazy else processes_with_open(device)
            if processes:
                raise Busy(
                    f"{device} is open in process {processes[0]}",
                    hint="end what uses it, or detach it with --lazy",
                )
            lazy = True
        self._users.leave(attachment_id, BY_HAND, lazy=lazy)

    def release(self, args: dict[str, Any]) -> None:
        """Takes away what was attached for a process alone, after an attach that is under way."""
        self._users.release(_user(args))

    def _path(self, attachment_id: str) -> Path | None:
        """The file or disk of an attachment; None when it has no disk now."""
        if attachment_id.endswith(UBLK):
            from imgsnap.node.ublk_devices import disk_of

            return disk_of(self._places.server.ublk, attachment_id)
        return self._places.server.device(attachment_id)


def _user(args: dict[str, Any]) -> str:
    """Who attaches. Raises InvalidArgument."""
    process = args.get("process")
    if process is None:
        return BY_HAND
    try:
        pid, start_time = map(int, process)
    except (TypeError, ValueError) as error:
        raise InvalidArgument("a process is its pid and its start time") from error
    return process_user(ProcessId(pid, start_time))
