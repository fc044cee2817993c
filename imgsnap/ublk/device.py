"""A snapshot's device as a disk, /dev/ublkbN: made, taken over, taken away."""

import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass

from imgsnap.blockstore.content import FileContent
from imgsnap.errors import ImgsnapError, Unavailable
from imgsnap.ublk import uapi
from imgsnap.ublk.control import Shape, UblkControl, block_path, open_queues
from imgsnap.ublk.loop import Loop, Queue
from imgsnap.units import KIB

DEPTH = 32
REQUEST_MAX = 512 * KIB
READ_AHEAD = 512 * KIB
LOOPS = 2
"""Threads for all the devices of a process, and queues of each: Python runs one at a time, but what
they wait for in the kernel goes on beside."""
NODE_S = 5.0
"""For the disk's node: devtmpfs has it at once, udev may rename."""
_LOOK_S = 0.005
_END_S = 5.0
_log = logging.getLogger(__name__)


class Loops:
    """The threads; made when the first device needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loops: list[Loop] = []

    def serve(self, queue: Queue) -> None:
        """Raises OSError when there is no io_uring."""
        with self._lock:
            while len(self._loops) < LOOPS:
                self._loops.append(Loop(f"ublk-{len(self._loops)}"))
        self._loops[queue.number % LOOPS].serve(queue)

    def trim(self) -> None:
        """Gives memory back that idle queues have: call it every few seconds."""
        for loop in self._loops:
            loop.trim()

    def abandon(self) -> None:
        """The process ends: what cannot be read from now on is left to the next server."""
        for loop in self._loops:
            loop.abandon()


@dataclass
class UblkDevice:
    """A started device that this process serves."""

    number: int
    control: UblkControl
    queues: "_Queues"

    def remove(self) -> None:
        """Takes the disk away, also from who has it open. Raises OSError EBUSY instead where the
        kernel can tell and somebody has: ask before, too."""
        self.control.stop(self.number, unless_open=True)
        self.queues.ended.wait(_END_S)
        self.control.delete(self.number)


class _Queues:
    """What is open of a device until the last of its queues has ended."""

    def __init__(self, fd: int, count: int) -> None:
        self.ended = threading.Event()
        self._fd = fd
        self._left = count
        self._lock = threading.Lock()

    def queue_ended(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        os.close(self._fd)
        self.ended.set()


def create(
    control: UblkControl,
    loops: Loops,
    content: FileContent,
    mark: int,
    wanted: int | None = None,
) -> UblkDevice:
    """A new read-only disk with these bytes; returns when its node is there.

    `mark` tells whose it is. Raises AlreadyExists when the wanted number is taken, AccessDenied,
    Unavailable, ImgsnapError, OSError; then there is none.
    """
    shape = Shape(min(LOOPS, os.cpu_count() or 1), DEPTH, REQUEST_MAX)
    info = control.add(shape, mark, wanted)
    number: int = info.dev_id
    try:
        control.set_size(number, content.size, info.max_io_buf_bytes, READ_AHEAD)
        device = _serve(control, loops, info, content)
        control.start(number)
        _wait_for_node(number)
        return device
    except BaseException:
        drop(control, number)
        raise


def take_over(control: UblkControl, loops: Loops, content: FileContent, number: int) -> UblkDevice:
    """Serves a disk whose server is dead, in the shape it has; reads that wait go on.

    Raises NotFound, OSError: EINVAL and EBUSY when it never was started.
    """
    info = control.info(number)
    control.begin_recovery(number)
    device = _serve(control, loops, info, content)
    control.end_recovery(number)
    return device


def _serve(
    control: UblkControl, loops: Loops, info: uapi.DeviceInfo, content: FileContent
) -> UblkDevice:
    shape = Shape(info.nr_hw_queues, info.queue_depth, info.max_io_buf_bytes)
    fd = open_queues(info.dev_id)
    queues = _Queues(fd, shape.queues)
    for number in range(shape.queues):
        loops.serve(Queue(fd, number, shape, content, queues.queue_ended))
    return UblkDevice(info.dev_id, control, queues)


def _wait_for_node(number: int) -> None:
    path, deadline = block_path(number), time.monotonic() + NODE_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise Unavailable(f"{path} does not appear", hint="is /dev a devtmpfs here?")
        time.sleep(_LOOK_S)


def drop(control: UblkControl, number: int) -> None:
    """Removes a device that did not come up, or that nobody serves; whoever has it open has errors.
    What the kernel refuses of that is left."""
    with contextlib.suppress(OSError, ImgsnapError):
        control.stop(number)
    with contextlib.suppress(OSError, ImgsnapError):
        control.delete(number)
