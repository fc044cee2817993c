"""A guest's network: a tap interface in a network namespace of its own, and a way to the host.

::

    guest eth0 ── tap0 ── bridge ── veth ── host
    \\_________ namespace ________/

The guest has the second address of a private /30, the host the first one. pyroute2 is imported only
here: who needs no network needs no such package.
"""

import contextlib
import ipaddress
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from imgsnap.errors import AccessDenied, ResourceExhausted, Unsupported

NETWORK = ipaddress.IPv4Network("10.213.0.0/16")
"""Networks of guests are cut from it, four addresses each."""
TAP = "tap0"
_PREFIX = 30
_ATTEMPTS = 64


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
        return [str(shutil.which("nsenter")), f"--net=/run/netns/{self.namespace}"]

    @property
    def parameters(self) -> list[str]:
        """Words for the guest's kernel command line; init.sh reads them."""
        return [f"imgsnap.address={self.guest}/{_PREFIX}", f"imgsnap.gateway={self.host}"]


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
    name = f"imgsnap-{secrets.token_hex(4)}"
    with pyroute2.IPRoute() as host:
        network = _free_network(host, name)
        with contextlib.ExitStack() as stack:
            stack.callback(_remove, pyroute2, host, network)
            try:
                _build(pyroute2, host, network)
            except (pyroute2.NetlinkError, PermissionError) as error:
                raise AccessDenied(
                    f"a guest's network: {error}", hint="run as root, with CAP_NET_ADMIN"
                ) from error
            yield network


def _remove(pyroute2: Any, host: Any, network: Network) -> None:
    """The namespace takes the tap and the bridge with it; the kernel may take its time for that."""
    for index in host.link_lookup(ifname=network.outside):
        host.link("del", index=index)
    with contextlib.suppress(FileNotFoundError):
        pyroute2.netns.remove(network.namespace)


def _free_network(host: Any, namespace: str) -> Network:
    used = [
        ipaddress.IPv4Network(f"{found.get_attr('RTA_DST')}/{found['dst_len']}")
        for found in host.get_routes(family=2)
        if found.get_attr("RTA_DST")
    ]
    for _ in range(_ATTEMPTS):
        offset = secrets.randbelow(NETWORK.num_addresses >> 2) << 2
        first = NETWORK.network_address + offset
        network = ipaddress.IPv4Network((first, _PREFIX))
        if not any(network.overlaps(other) for other in used):
            return Network(namespace, guest=str(first + 2), host=str(first + 1))
    raise ResourceExhausted(f"no free network for a guest in {NETWORK}")


def _build(pyroute2: Any, host: Any, network: Network) -> None:
    name, outside = network.namespace, network.outside
    pyroute2.netns.create(name)
    with pyroute2.NetNS(name) as inside:
        inside.link("set", index=1, state="up")
        inside.link("add", ifname="br0", kind="bridge")
        inside.link("add", ifname=TAP, kind="tuntap", mode="tap")
        host.link("add", ifname=outside, kind="veth", peer={"ifname": "up0", "net_ns_fd": name})
        bridge = inside.link_lookup(ifname="br0")[0]
        for port in (TAP, "up0"):
            index = inside.link_lookup(ifname=port)[0]
            inside.link("set", index=index, master=bridge, state="up")
        inside.link("set", index=bridge, state="up")
    index = host.link_lookup(ifname=outside)[0]
    host.addr("add", index=index, address=network.host, prefixlen=_PREFIX)
    host.link("set", index=index, state="up")
