"""Closing of this host's localhost, through which containers are reached: for `teardown`, and for upgrades.

127.0.0.0/8 is open where route_localnet of a container's interface is 1, and ::1 where that interface has our local
route for it. Both stay when the rules go, and then nothing guards them any more (CVE-2020-8558). So localhost is closed
before the table is deleted; except where another publisher's containers on the same interface need it.
"""
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from socket import AF_INET, if_nametoindex, inet_ntop
from typing import NamedTuple

from ..ruleset import OPENED
from .expressions import DnatRule
from .kernel import LOCALHOST_METRIC, Kernel
from .netlink import delete_local_route, interface_to, link_kind, local_routes, name_of, prefixes_of, uplink
from .table import translations

# Other publishers whose DNAT rules forward this host's localhost to containers, by the names of tables and chains.
PUBLISHERS = (("cni_hostport", "", "the reference plugin portmap"), ("nat", "CNI-DN-", "the reference plugin portmap"),
              ("nat", "DOCKER", "Docker"), ("nat", "NETAVARK-DN-", "netavark"), ("netavark", "", "netavark"))
LOCALNET = "net.ipv4.conf.%s.route_localnet"
LEGACY = "/proc/net/ip_tables_names"


class Closing(NamedTuple):
    """The changes that `close` made, or would make: interfaces by name; `left_open` with the reason."""

    ipv4: list[str]
    ipv6: list[str]
    left_open: dict[str, str]


def interfaces_of_published(kernel: Kernel) -> list[str]:
    """The open interfaces that lead to published containers: what version 0.1.0 has opened, and did not note."""
    targets = kernel.targets(owner.chain for owner in kernel.owners())
    names = {interface_to(4, inet_ntop(AF_INET, target)) for found in targets.values() for target in found
             if len(target) == 4}
    return sorted(name for name in names if name and kernel.localnet(name))


def open_interfaces() -> list[str]:
    """The interfaces that are open to 127.0.0.0/8, but those that have an address of it: somebody uses it there."""
    return [name for name in _interfaces() if _is_open(name) and _is(
        name, lambda index: not any(prefix.startswith("127.") for prefix in prefixes_of(4, index)))]


def open_bridges() -> list[str]:
    """Those of them that are bridges, but the uplink: of those that publishers open, they outlive their containers."""
    return [name for name in open_interfaces() if _is(
        name, lambda index: link_kind(index) == "bridge" and index != uplink(4))]


def _is(name: str, question: Callable[[int], bool]) -> bool:
    """Ask something about an interface, by its index; False where it has gone."""
    try:
        return question(if_nametoindex(name))
    except OSError:
        return False


def _is_open(name: str) -> bool:
    try:
        with open(f"/proc/sys/net/ipv4/conf/{name}/route_localnet") as value:
            return value.read() == "1\n"
    except OSError:
        return False


def close(kernel: Kernel, dry_run: bool = False) -> Closing:
    """Close what this plugin has opened, but what somebody else's containers need. To be called under the lock."""
    opened = [name for name, comment in kernel.noted().items() if comment == OPENED] if kernel.notes_interfaces() else \
        interfaces_of_published(kernel)
    candidates = [name for name in opened if kernel.localnet(name)]
    needed = dict(_needed_by_others()) if candidates else {}
    left_open = {name: needed.get(name) or needed[""] for name in candidates if name in needed or "" in needed}
    left_open |= {name: f"the table does not say that cni-portmap opened it; to close it: sysctl -w {LOCALNET % name}=0"
                  for name in _interfaces() if name not in candidates and kernel.localnet(name)}
    routes = {index: name for index in local_routes("::1", LOCALHOST_METRIC) if (name := name_of(index))}
    closing = Closing([name for name in candidates if name not in left_open], [*routes.values()], left_open)
    if not dry_run:
        for name in closing.ipv4:
            kernel.set_localnet(name, False)
        for index in routes:
            delete_local_route("::1", index, LOCALHOST_METRIC)
    return closing


def _interfaces() -> list[str]:
    return sorted({*os.listdir("/proc/sys/net/ipv4/conf")} - {"all", "default", "lo"})


def _needed_by_others() -> Iterator[tuple[str, str]]:
    """Interfaces through which others lead localhost to a container, with who does; "" for every interface."""
    for table, chain, raw in translations():
        for its_table, prefix, publisher in PUBLISHERS:
            if table == its_table and chain.startswith(prefix) and (target := _target(raw)):
                yield interface_to(4, inet_ntop(AF_INET, target)), f"{publisher} publishes a container there"
    try:
        with open(LEGACY) as names:
            if "nat\n" not in names:
                return
    except OSError:
        return
    program = shutil.which("iptables-legacy-save")
    if not program:
        yield "", "iptables-legacy has nat rules, and iptables-legacy-save is not installed to read them"
        return
    listing = subprocess.run([program, "-t", "nat"], capture_output=True, text=True, check=False).stdout
    for line in listing.splitlines():
        words = line.split()
        for _, prefix, publisher in PUBLISHERS:
            if prefix and words[:1] == ["-A"] and words[1].startswith(prefix) and "--to-destination" in words:
                ip = words[words.index("--to-destination") + 1].partition(":")[0]
                yield interface_to(4, ip), f"{publisher} publishes a container there"


def _target(raw: bytes) -> bytes:
    """The IPv4 address, packed, that a rule translates to: nftables' own dnat, or iptables' DNAT; b"" for none."""
    target = DnatRule(raw, lambda _: (), 4).target
    return target if len(target) == 4 else b""
