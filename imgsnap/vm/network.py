"""A guest's network: a tap interface in a network namespace of its own, and a way to the host.

::

    guest eth0 ── tap0 ── bridge ── veth ── host
    \\_________ namespace ________/

The guest has the second address of a private /30, the host the first one. pyroute2 is imported only
here: who needs no network needs no such package.
"""

import contextlib
import ipaddress
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgsnap.errors import AccessDenied, ResourceExhausted, Unsupported
from imgsnap.mount import linux
from imgsnap.mount.linux import UmountFlag
from imgsnap.mount.process import ProcessId

NETWORK = ipaddress.IPv4Network("10.213.0.0/16")
"""Networks of guests are cut from it, four addresses each."""
TAP = "tap0"
NAMESPACES = Path("/run/netns")
_PREFIX_NAME = "imgsnap-"
"""Begins a namespace's name; its owner's pid and start time follow, and a random token."""
_LENGTH = 30
_ATTEMPTS = 64
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@dataclass(frozen=True, slots=True)
class Network:
    """What a guest is told, and where its QEMU runs."""

    namespace: str
    guest: str  # address
    host: str  # address

    @property
    def outside(self) -> str:
        """The host's interface; a name has at most 15 characters."""
        return f"is{self.namespace.rpartition('-')[2]}"

    @property
    def command_prefix(self) -> list[str]:
        """Words before a command that has to find the tap interface."""
        return [str(shutil.which("nsenter")), f"--net={NAMESPACES / self.namespace}"]

    @property
    def parameters(self) -> list[str]:
        """Words for the guest's kernel command line; init.sh reads them."""
        return [f"imgsnap.address={self.guest}/{_LENGTH}", f"imgsnap.gateway={self.host}"]


@contextlib.contextmanager
def guest_network() -> Iterator[Network]:
    """A network, gone when the block is left.

    Raises Unsupported without pyroute2 or nsenter, AccessDenied without privileges,
    ResourceExhausted when no range of addresses is free.
    """
    try:
        import pyroute2
    except ImportError as error:
        raise Unsupported(
            "a guest's network needs the Python package pyroute2",
            hint="pip install 'imgsnap[net]'",
        ) from error
    if shutil.which("nsenter") is None:
        raise Unsupported("a guest's network needs nsenter", hint="install util-linux")
    _remove_stale()
    with contextlib.ExitStack() as stack:
        with _undisturbed():
            network = _free_network(pyroute2)
            stack.callback(_remove, network.namespace)
            try:
                _build(pyroute2, network)
            except (pyroute2.NetlinkError, PermissionError) as error:
                raise AccessDenied(
                    f"a guest's network: {error}", hint="run as root, with CAP_NET_ADMIN"
                ) from error
        yield network


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait: an exception in the middle of its event loop leaves pyroute2 hanging."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _remove(namespace: str) -> None:
    """Takes all of it away: interfaces live in the namespace, or with a peer that does."""
    path = NAMESPACES / namespace
    with contextlib.suppress(OSError):
        linux.umount(path, UmountFlag.DETACH)
    path.unlink(missing_ok=True)


def _remove_stale() -> None:
    """What runs left that were killed."""
    for path in NAMESPACES.glob(f"{_PREFIX_NAME}*"):
        owner = path.name.removeprefix(_PREFIX_NAME).rpartition("-")[0]
        pid, _, start_time = owner.partition("-")
        known = pid.isdigit() and start_time.isdigit()
        if known and not ProcessId(int(pid), int(start_time)).alive:
            _remove(path.name)


def _free_network(pyroute2: Any) -> Network:
    me, token = ProcessId.of(os.getpid()), secrets.token_hex(4)
    namespace = f"{_PREFIX_NAME}{me.pid}-{me.start_time}-{token}"
    with pyroute2.IPRoute() as host:
        used = [
            ipaddress.IPv4Network(f"{found.get_attr('RTA_DST')}/{found['dst_len']}")
            for found in host.get_routes(family=socket.AF_INET)
            if found.get_attr("RTA_DST")
        ]
    for _ in range(_ATTEMPTS):
        offset = secrets.randbelow(NETWORK.num_addresses >> 2) << 2
        first = NETWORK.network_address + offset
        network = ipaddress.IPv4Network((first, _LENGTH))
        if not any(network.overlaps(other) for other in used):
            return Network(namespace, guest=str(first + 2), host=str(first + 1))
    raise ResourceExhausted(f"no free network for a guest in {NETWORK}")


def _build(pyroute2: Any, network: Network) -> None:
    """Both sides, one after the other: pyroute2 has one open at a time."""
    name, outside = network.namespace, network.outside
    pyroute2.netns.create(name)
    with pyroute2.IPRoute() as host:
        host.link("add", ifname=outside, kind="veth", peer={"ifname": "up0", "net_ns_fd": name})
        index = host.link_lookup(ifname=outside)[0]
        host.addr("add", index=index, address=network.host, prefixlen=_LENGTH)
        host.link("set", index=index, state="up")
    with pyroute2.NetNS(name) as inside:
        inside.link("set", index=1, state="up")
        inside.link("add", ifname="br0", kind="bridge")
        inside.link("add", ifname=TAP, kind="tuntap", mode="tap")
        bridge = inside.link_lookup(ifname="br0")[0]
        for port in (TAP, "up0"):
            index = inside.link_lookup(ifname=port)[0]
            inside.link("set", index=index, master=bridge, state="up")
        inside.link("set", index=bridge, state="up")
