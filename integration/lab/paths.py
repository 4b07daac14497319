"""The packet paths of a published port, as data: a path is a line, and a `Setting` is a kind of network.

test_packets.py asserts them on a `site.Site`, and measure/paths.py measures them with any portmap plugin.
"""
from typing import NamedTuple

EVERY, LOCAL, LAN = 8080, 8081, 8082  # published on every address, on localhost only, on the LAN address only
OWN = 9090  # not published: a service of the host, on localhost
WEB = 80  # the container's port
NOBODY = ""

# name: (IPv4, IPv6) of what is connected to; a site adds those of containers, their networks and "bridge address"
ADDRESSES = {
    "LAN address": ("192.0.2.1", "2001:db8::1"),
    "second address": ("198.51.100.1", "2001:db8:51::1"),
    "address added after ADD": ("203.0.113.1", "2001:db8:113::1"),
    "localhost": ("127.0.0.1", "::1"),
    "127.8.8.8": ("127.8.8.8", ""),
    "127.9.9.9": ("127.9.9.9", ""),
    "client": ("192.0.2.2", "2001:db8::2"),
    "stranger's bridge address": ("10.89.0.1", "fd89::1"),
    "far client": ("198.51.101.2", "2001:db8:101::2"),
    "hostile machine": ("192.0.3.2", ""),
    "administrator's machine": ("192.0.4.2", ""),
}
OTHERS = {"container's other address": "container", "neighbour's other address": "neighbour"}  # of a second subnet


class Path(NamedTuple):
    """A client, the address and port it connects to, its own address, and the peer that the container then sees."""

    who: str
    to: str
    sees: str
    port: int = EVERY
    source: str = ""

    def __str__(self) -> str:
        where = {EVERY: "", LOCAL: " (published on localhost only)", LAN: " (published on the LAN address only)",
                 OWN: " (the host's own service)"}[self.port]
        return f"{self.who}{f', from {self.source},' if self.source else ''} to {self.to}{where}"


PATHS = (
    Path("client", "LAN address", "client"),
    Path("far client", "LAN address", "far client"),  # the client routes for it
    Path("client", "second address", "client"),
    Path("client", "address added after ADD", "client"),
    Path("client", "bridge address", "client"),
    Path("host", "LAN address", "LAN address"),
    Path("host", "second address", "second address"),
    Path("host", "bridge address", "bridge address"),
    Path("host", "localhost", "bridge address"),
    Path("host", "127.8.8.8", "bridge address"),
    Path("host", "localhost", "bridge address", source="127.9.9.9"),
    Path("host", "localhost", "LAN address", source="LAN address"),
    Path("container", "LAN address", "bridge address"),
    Path("container", "bridge address", "bridge address"),
    Path("neighbour", "LAN address", "bridge address"),
    Path("neighbour", "bridge address", "bridge address"),
    Path("container", "LAN address", "bridge address", source="container's other address"),
    Path("neighbour", "LAN address", "bridge address", source="neighbour's other address"),
    Path("stranger", "LAN address", "stranger"),
    Path("stranger", "bridge address", "stranger"),
    Path("stranger", "stranger's bridge address", "stranger"),
    Path("client", "LAN address", "client", LAN),
    Path("host", "LAN address", "LAN address", LAN),
    Path("container", "LAN address", "bridge address", LAN),
    Path("neighbour", "LAN address", "bridge address", LAN),
    Path("stranger", "LAN address", "stranger", LAN),
    Path("client", "second address", NOBODY, LAN),
    Path("host", "localhost", NOBODY, LAN),
    Path("host", "localhost", "bridge address", LOCAL),
    Path("host", "localhost", "LAN address", LOCAL, source="LAN address"),  # Kubernetes' conformance test
    Path("client", "LAN address", NOBODY, LOCAL),
    Path("neighbour", "bridge address", NOBODY, LOCAL),
    Path("hostile machine", "localhost", NOBODY),  # it routes 127.0.0.0/8 to the host
    Path("hostile machine", "localhost", NOBODY, LOCAL),
    Path("hostile machine", "localhost", NOBODY, OWN),
    Path("hostile neighbour", "localhost", NOBODY),
    Path("hostile neighbour", "localhost", NOBODY, LOCAL),
    Path("hostile neighbour", "localhost", NOBODY, OWN),
    # Its wire is named loopback0, as in WSL2, and the administrator has opened it: the host's services answer there.
    Path("administrator's machine", "localhost", "administrator's machine", OWN),
    Path("administrator's machine", "localhost", NOBODY),
    Path("administrator's machine", "localhost", NOBODY, LOCAL),
)
ROUTE_LOCALHOST = {"hostile machine", "hostile neighbour", "administrator's machine"}


CONTAINERS = "10.88.0.0/16", "fd88::/64"
LAN_SUBNETS = "192.0.2.0/24", "2001:db8::/64"  # containers get the upper half of the IPv4 one


class Setting(NamedTuple):
    """A kind of network for the container."""

    name: str
    plugin: str = "bridge"
    families: tuple[int, ...] = (4, 6)
    br_netfilter: bool = False
    rp_filter: int = 0  # 1: strict, as RHEL has it; 2: loose, as systemd has it
    ip_masq: bool = False  # the network masquerades what its containers send; needs iptables
    subnets: tuple[str, ...] = CONTAINERS
    uplink: str = ""  # the LAN is a port of the bridge; the container's gateway is the "host", or the "client"
    isolated: bool = False  # the bridge carries nothing from container to container
    second_network: bool = False  # the container is in the stranger's network, too, and publishes the same there
    localnet: str = ""  # on which interface, or "all", somebody else has set route_localnet


SETTINGS = (
    Setting("bridge"),
    Setting("bridge, br_netfilter", br_netfilter=True),
    Setting("bridge, ipMasq, strict rp_filter", ip_masq=True, rp_filter=1),
    Setting("ptp", "ptp"),
    Setting("bridge, IPv4 only", families=(4,)),
    Setting("bridge, IPv6 only", families=(6,)),
    Setting("bridge, two subnets", subnets=(*CONTAINERS, "10.87.0.0/16", "fd87::/64")),
    Setting("two networks", second_network=True),
    Setting("ptp in the LAN's subnet", "ptp", subnets=LAN_SUBNETS),
    Setting("bridge with the uplink", subnets=LAN_SUBNETS, uplink="host"),
    Setting("bridge with the uplink, br_netfilter", subnets=LAN_SUBNETS, uplink="host", br_netfilter=True),
    Setting("bridge with the uplink, another gateway", subnets=LAN_SUBNETS, uplink="client"),
    Setting("bridge, isolated ports", isolated=True),
    Setting("bridge, all.route_localnet=1", localnet="all"),
    Setting("bridge, route_localnet=1 on the uplink", localnet="to-lan-hostile"),
)


def exists(path: Path, setting: Setting, family: int) -> bool:
    """Whether the path has addresses of the family. No machine can route ::1 to the host."""
    named = (path.to, path.source) if path.source else (path.to,)
    return family in setting.families and all(ADDRESSES.get(name, "46")[family == 6] for name in named) and \
        not (family == 6 and path.who in ROUTE_LOCALHOST) and \
        (path.source not in OTHERS or len(setting.subnets) > 2 or
         (setting.second_network and OTHERS[path.source] == "container"))


def wanted(path: Path, setting: Setting) -> str:
    """Whom the container should see."""
    sees = path.sees
    if setting.plugin == "ptp" and path.who == "neighbour" and sees != NOBODY:
        return "neighbour"  # it is on another link, so the container answers it through this host
    if (setting.ip_masq or setting.second_network) and sees == "stranger":
        sees = "bridge address"  # in its second network the container answers it without this host
    if setting.uplink:
        if sees == "client" or (sees == "far client" and setting.uplink == "client"):
            sees = "bridge address"  # the same of a machine in the LAN, and of all for which it routes
        if sees == "bridge address":
            return "LAN address"
    if (setting.localnet and path.who == "hostile machine" and path.port == OWN) or \
            (setting.localnet == "all" and path.who == "hostile neighbour" and setting.plugin == "ptp"):
        return path.who  # somebody else has opened its wire
    return sees


def expected(path: Path, setting: Setting, family: int) -> str:
    """Whom the container sees, as far as Linux can do it."""
    if (family, path.to, path.source) == (6, "localhost", "") and setting.br_netfilter:
        return NOBODY  # the bridge itself makes the reply's destination ::1 again, and IPv6 takes none from a wire
    if setting.uplink == "client" and path.sees == "far client":
        return NOBODY  # nothing here says that the container has another gateway: it takes masqAll
    return wanted(path, setting)
