"""Links, addresses and routes of the network namespace that this thread is in, over rtnetlink.

pyroute2 of Debian 12 (0.7.2) and of Debian 13 (0.8.1) do all of this alike. Each function opens a socket and closes it
again (0.1 ms): nothing of it outlives a call, no process and no thread, and none is kept for a namespace that is left.
"""
import contextlib
import os
import pathlib
import socket

from pyroute2 import IPRoute

_TENTATIVE = 0x40  # IFA_F_TENTATIVE
_NODAD = 2  # IFA_F_NODAD: no duplicate address detection, so usable at once
_LOCAL_TABLE = 255  # RT_TABLE_LOCAL


def family_of(ip: str) -> socket.AddressFamily:
    """The family of an address or network."""
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def add_veth(device: str, peer: str, netns: str = "", index: int = 0) -> None:
    """Make a pair of links, `peer` in the namespace at the path `netns`; `index`: the number of `device`."""
    with contextlib.ExitStack() as stack:
        other: dict[str, object] = {"ifname": peer}
        if netns:
            fd = other["net_ns_fd"] = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        number = {"index": index} if index else {}
        stack.enter_context(IPRoute()).link("add", ifname=device, kind="veth", peer=other, **number)


def add_bridge(device: str) -> None:
    """Make a bridge that forwards at once."""
    with IPRoute() as ip:
        ip.link("add", ifname=device, kind="bridge", br_forward_delay=0)


def enslave(device: str, bridge: str) -> None:
    """Make a link a port of a bridge."""
    with IPRoute() as ip:
        ip.link("set", index=socket.if_nametoindex(device), master=socket.if_nametoindex(bridge))


def isolate(port: str) -> None:
    """Let a bridge carry nothing from this port of it to others that are isolated (portIsolation of the plugin)."""
    with IPRoute() as ip:
        ip.brport("set", index=socket.if_nametoindex(port), isolated=1)


def bring_up(device: str, *ips: str) -> None:
    """Give a link addresses (address/length), which can be used at once, and bring it up."""
    add_addresses(device, *ips)
    with IPRoute() as ip:
        ip.link("set", index=socket.if_nametoindex(device), state="up")


def add_addresses(device: str, *ips: str) -> None:
    """Give a link addresses (address/length; without a length, of one address), which can be used at once."""
    with IPRoute() as ip:
        for each in ips:
            address, _, length = each.partition("/")
            v6 = ":" in address
            ip.addr("add", index=socket.if_nametoindex(device), address=address,
                    prefixlen=int(length or (128 if v6 else 32)), **({"flags": _NODAD} if v6 else {}))


def flush_addresses(device: str) -> None:
    """Take all addresses from a link."""
    with IPRoute() as ip:
        ip.flush_addr(index=socket.if_nametoindex(device))


def has_link(device: str) -> bool:
    """Whether there is a link of that name. The kernel removes those of a namespace some time after it."""
    return device in (name for _, name in socket.if_nameindex())


def delete_link(device: str, missing_ok: bool = False) -> None:
    """Delete a link, and so its other end."""
    if missing_ok and not has_link(device):
        return
    with IPRoute() as ip:
        ip.link("del", index=socket.if_nametoindex(device))


def have_settled() -> bool:
    """Whether each link has a link-local address that it may use: the last of what the kernel adds after it is up."""
    usable = {line.split()[5] for line in pathlib.Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
              if line.startswith("fe80") and not int(line.split()[4], 16) & _TENTATIVE}
    return usable >= {name for _, name in socket.if_nameindex() if name != "lo"}


def mac_of(device: str) -> bytes:
    """The MAC address of a link."""
    with IPRoute() as ip:
        link, = ip.link("get", index=socket.if_nametoindex(device))
    return bytes.fromhex(link.get_attr("IFLA_ADDRESS").replace(":", ""))


def add_route(network: str, gateway: str) -> None:
    """Add a route; `network`: "default" for all of the gateway's family."""
    with IPRoute() as ip:
        ip.route("add", dst=network, gateway=gateway, family=family_of(gateway))


def ipv4_gateway() -> str:
    """The gateway of the default route for IPv4, "" if there is none."""
    with IPRoute() as ip:
        routes = [route.get_attr("RTA_GATEWAY") for route in ip.get_default_routes(socket.AF_INET)]
    return routes[0] if routes else ""


def localhost_routes() -> list[tuple[str, int]]:
    """Device and metric of each route for ::1."""
    with IPRoute() as ip:
        routes = ip.get_routes(family=socket.AF_INET6, table=_LOCAL_TABLE)
        return [(socket.if_indextoname(route.get_attr("RTA_OIF")), route.get_attr("RTA_PRIORITY")) for route in routes
                if route.get_attr("RTA_DST") == "::1"]
