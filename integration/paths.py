"""The packet paths of a published port, as data: a path is a line.

test_packets.py asserts them, and compare.py measures them with any portmap plugin. A `Setting` is a kind of network,
a `Site` is the machines around one: those who connect, by name, and the addresses that they connect to, by name.
"""
import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import lab

EVERY, LOCAL, LAN = 8080, 8081, 8082  # published on every address, on localhost only, on the LAN address only
OWN = 9090  # not published: a service of the host, on localhost
WEB = 80  # the container's port
NOBODY = ""

# name: (IPv4, IPv6) of what is connected to; a Site adds "container", "neighbour", "stranger" and "bridge address"
ADDRESSES = {
    "LAN address": ("192.0.2.1", "2001:db8::1"),
    "second address": ("198.51.100.1", "2001:db8:51::1"),
    "address added after ADD": ("203.0.113.1", "2001:db8:113::1"),
    "localhost": ("127.0.0.1", "::1"),
    "127.8.8.8": ("127.8.8.8", ""),
    "127.9.9.9": ("127.9.9.9", ""),
    "client": ("192.0.2.2", "2001:db8::2"),
    "stranger's bridge address": ("10.89.0.1", "fd89::1"),
    "hostile machine": ("192.0.3.2", ""),
}


class Path(NamedTuple):
    """Who connects to which address and port, from which of its own addresses, and whom the container then sees."""

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
)


class Setting(NamedTuple):
    """How the container is connected."""

    name: str
    plugin: str = "bridge"
    families: tuple[int, ...] = (4, 6)
    br_netfilter: bool = False
    rp_filter: int = 0  # 1: strict, as RHEL has it; 2: loose, as systemd has it
    ip_masq: bool = False  # the network masquerades what its containers send; needs iptables


SETTINGS = (
    Setting("bridge"),
    Setting("bridge, br_netfilter", br_netfilter=True),
    Setting("bridge, ipMasq, strict rp_filter", ip_masq=True, rp_filter=1),
    Setting("ptp", "ptp"),
    Setting("bridge, IPv4 only", families=(4,)),
    Setting("bridge, IPv6 only", families=(6,)),
)


def exists(path: Path, setting: Setting, family: int) -> bool:
    """Whether the path has addresses of the family. No wire carries a route for ::1, so nobody hostile has one."""
    named = (path.to, path.source) if path.source else (path.to,)
    return family in setting.families and all(ADDRESSES.get(name, "46")[family == 6] for name in named) and \
        not (family == 6 and path.who.startswith("hostile"))


def wanted(path: Path, setting: Setting) -> str:
    """Whom the container should see."""
    return "bridge address" if setting.ip_masq and path.sees == "stranger" else path.sees


def expected(path: Path, setting: Setting, family: int) -> str:
    """Whom the container sees, as far as Linux can do it."""
    if (family, path.to, path.source) == (6, "localhost", "") and setting.br_netfilter:
        return NOBODY  # the bridge itself makes the reply's destination ::1 again, and IPv6 takes none from a wire
    return wanted(path, setting)


def _mappings() -> list[dict[str, Any]]:
    every = [{"hostPort": EVERY, "containerPort": WEB, "protocol": protocol} for protocol in ("tcp", "udp", "sctp")]
    one = [{"hostPort": port, "containerPort": WEB, "protocol": protocol, "hostIP": ip}
           for port, name in ((LOCAL, "localhost"), (LAN, "LAN address")) for ip in ADDRESSES[name]
           for protocol in ("tcp", "udp")]
    return every + one


class Site:
    """A host with a LAN, and a published container in a network of the kind `setting`; `portmap`: its configuration.

    A context manager: until its end, its host is this thread's.
    """

    def __init__(self, setting: Setting, bin_dir: pathlib.Path, **portmap: Any) -> None:
        self.setting, self.bin_dir, self.portmap = setting, bin_dir, portmap
        self.addresses = dict(ADDRESSES)

    def __enter__(self) -> "Site":
        self._stack = contextlib.ExitStack()
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        self._stack.enter_context(lab.fresh_host())
        for which in "all", "default":
            lab.sysctl(f"net.ipv4.conf.{which}.rp_filter", self.setting.rp_filter)
        lab.br_netfilter(self.setting.br_netfilter)
        lan = [f"{ip}/{length}" for ip, length in zip(ADDRESSES["LAN address"], (24, 64))]
        self.client = lab.wire("lan-client", tuple(lan), ("192.0.2.2/24", "2001:db8::2/64"))
        hostile = lab.wire("lan-hostile", ("192.0.3.1/24",), ("192.0.3.2/24",))
        for machine in self.client, hostile:
            self._stack.callback(machine.remove)
        self._address("second address")
        self.network = self._network("home", "cni0", ("10.88.0.0/16", "fd88::/64"))
        self.container = self._container(self.network, "container", _mappings())
        self.servers: dict[tuple[int, int, str], lab.Server] = {}  # by port (of EVERY or OWN), family and protocol
        for protocol in "tcp", "udp":
            web = self._stack.enter_context(lab.Server("web", self.container, WEB, protocol))
            for family, ip in zip((4, 6), ADDRESSES["localhost"]):
                self.servers[EVERY, family, protocol] = web
                own = self._stack.enter_context(lab.Server("host", lab.HOST, OWN, protocol, ip))
                self.servers[OWN, family, protocol] = own
        neighbour = self._container(self.network, "neighbour")
        mean = self._container(self.network, "hostile-neighbour")
        self.far = self._network("far", "cni1", ("10.89.0.0/16", "fd89::/64"))
        stranger = self._container(self.far, "stranger")
        for machine in hostile, mean.namespace:
            _route_localhost(machine)
        self.places = {"client": self.client, "host": lab.HOST, "container": self.container, "neighbour": neighbour,
                       "stranger": stranger, "hostile machine": hostile, "hostile neighbour": mean}
        for name, place in self.places.items():
            if isinstance(place, lab.Container):
                self.addresses[name] = place.ipv4, place.ipv6
        self.addresses["bridge address"] = "10.88.0.1", "fd88::1"
        self._address("address added after ADD")

    def _address(self, name: str) -> None:
        for ip in ADDRESSES[name]:
            lab.run("ip", "address", "add", ip, "dev", "lo")

    def _network(self, name: str, bridge: str, subnets: tuple[str, str]) -> lab.Network:
        wanted = tuple(subnet for subnet, family in zip(subnets, (4, 6)) if family in self.setting.families)
        conflist = lab.bridge_conflist(name, bridge, wanted, **self.portmap) if self.setting.plugin == "bridge" else \
            lab.ptp_conflist(name, wanted, **self.portmap)
        conflist["plugins"][0]["ipMasq"] = self.setting.ip_masq
        return lab.Network(conflist, self.bin_dir)

    def _container(self, network: lab.Network, name: str, ports: object = ()) -> lab.Container:
        container = lab.Container(network, name, ports)
        self._stack.callback(container.remove)
        return container

    @contextlib.contextmanager
    def publish(self, name: str, ports: object, protocol: str = "tcp", network: lab.Network | None = None,
                **portmap: Any) -> Iterator[lab.Container]:
        """One more container in the network, with a server on WEB; `portmap`: more of the plugin's configuration."""
        conflist = (network or self.network).conflist
        first, second = conflist["plugins"]
        network = lab.Network({**conflist, "plugins": [first, {**second, **portmap}]}, self.bin_dir)
        container = lab.Container(network, name, ports)
        try:
            container.check()
            with lab.Server(name, container, WEB, protocol):
                yield container
        finally:
            container.remove()

    def ip(self, name: str, family: int) -> str:
        return self.addresses[name][family == 6]

    def try_path(self, path: Path, family: int, protocol: str, timeout: float = 2.5) -> str:
        """The name of the address that the container saw, NOBODY if it saw nothing or did not answer."""
        saw = lab.exchange(self.places[path.who], self.ip(path.to, family), path.port, protocol,
                           self.ip(path.source, family) if path.source else "", timeout)
        if saw is None or saw.server != ("host" if path.port == OWN else "web"):
            return NOBODY
        names = (name for name in self.addresses if self.ip(name, family) == saw.peer)
        return next(names, saw.peer)


def _route_localhost(machine: lab.Namespace) -> None:
    """Let a machine send 127.0.0.0/8 out to the host."""
    with machine:
        lab.sysctl("net.ipv4.conf.eth0.route_localnet", 1)
    machine.ip("address", "flush", "dev", "lo")  # it has no localhost of its own any more
    gateway = json.loads(lab.run("ip", "-n", machine.name, "-j", "route", "show", "default") or "[]")
    if gateway:
        machine.ip("route", "add", "127.0.0.0/8", "via", gateway[0]["gateway"])
