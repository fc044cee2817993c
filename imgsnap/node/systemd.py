"""What systemd and its services say to each other: readiness, sockets, and the descriptor store.

Source: sd_notify(3), sd_listen_fds(3), sd_pid_notify_with_fds(3). Without systemd nothing happens.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping

LISTEN_FDS_START = 3


def notify(environ: Mapping[str, str], state: str, descriptors: tuple[int, ...] = ()) -> bool:
    """Sends a state such as "READY=1", with descriptors for the store; whether somebody listens."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(address)
            socket.send_fds(connection, [state.encode()], list(descriptors))
        except OSError:
            return False
    return True


def store_descriptor(environ: Mapping[str, str], name: str, fd: int) -> bool:
    """Leaves a copy of a descriptor with systemd, which gives it to the service's next process."""
    return notify(environ, f"FDSTORE=1\nFDNAME={name}", (fd,))


def take_descriptors(environ: MutableMapping[str, str]) -> dict[str, int]:
    """The descriptors that systemd passed to this process, by name; once."""
    passed = environ.pop("LISTEN_FDS", "")
    pid = environ.pop("LISTEN_PID", "")
    names = environ.pop("LISTEN_FDNAMES", "")
    if not passed.isdigit() or pid != str(os.getpid()):
        return {}
    found = {}
    labels = names.split(":")
    for number in range(int(passed)):
        fd = LISTEN_FDS_START + number
        os.set_inheritable(fd, False)
        found[labels[number] if number < len(labels) else str(number)] = fd
    return found
