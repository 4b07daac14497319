"""A site: a published container in a network of some kind, and the machines around it that connect to it."""
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, Self

from .links import add_addresses, add_route, flush_addresses, ipv4_gateway
from .namespaces import HOST, Namespace, br_netfilter, fresh_host, sysctl, wire
from .paths import ADDRESSES, EVERY, LAN, LOCAL, NOBODY, OWN, WEB, Path, Setting
from .runtime import Container, Network, bridge_conflist, ptp_conflist
from .servers import Server, exchange


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

    def __enter__(self) -> Self:
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
        self._stack.enter_context(fresh_host())
        for which in "all", "default":
            sysctl(f"net.ipv4.conf.{which}.rp_filter", self.setting.rp_filter)
        br_netfilter(self.setting.br_netfilter)
        lan = [f"{ip}/{length}" for ip, length in zip(ADDRESSES["LAN address"], (24, 64))]
        self.client = wire("lan-client", tuple(lan), ("192.0.2.2/24", "2001:db8::2/64"))
        hostile = wire("lan-hostile", ("192.0.3.1/24",), ("192.0.3.2/24",))
        for machine in self.client, hostile:
            self._stack.callback(machine.remove)
        self._address("second address")
        self.network = self._network("home", "cni0", ("10.88.0.0/16", "fd88::/64"))
        self.container = self._container(self.network, "container", _mappings())
        self.servers: dict[tuple[int, int, str], Server] = {}  # by port (of EVERY or OWN), family and protocol
        for protocol in "tcp", "udp":
            web = self._stack.enter_context(Server("web", self.container, WEB, protocol))
            for family, ip in zip((4, 6), ADDRESSES["localhost"]):
                self.servers[EVERY, family, protocol] = web
                own = self._stack.enter_context(Server("host", HOST, OWN, protocol, ip))
                self.servers[OWN, family, protocol] = own
        neighbour = self._container(self.network, "neighbour")
        mean = self._container(self.network, "hostile-neighbour")
        self.far = self._network("far", "cni1", ("10.89.0.0/16", "fd89::/64"))
        stranger = self._container(self.far, "stranger")
        for machine in hostile, mean.namespace:
            _route_localhost(machine)
        self.places = {"client": self.client, "host": HOST, "container": self.container, "neighbour": neighbour,
                       "stranger": stranger, "hostile machine": hostile, "hostile neighbour": mean}
        for name, place in self.places.items():
            if isinstance(place, Container):
                self.addresses[name] = place.ipv4, place.ipv6
        self.addresses["bridge address"] = "10.88.0.1", "fd88::1"
        self._address("address added after ADD")

    def _address(self, name: str) -> None:
        add_addresses("lo", *ADDRESSES[name])

    def _network(self, name: str, bridge: str, subnets: tuple[str, str]) -> Network:
        wanted = tuple(subnet for subnet, family in zip(subnets, (4, 6)) if family in self.setting.families)
        conflist = bridge_conflist(name, bridge, wanted, **self.portmap) if self.setting.plugin == "bridge" else \
            ptp_conflist(name, wanted, **self.portmap)
        conflist["plugins"][0]["ipMasq"] = self.setting.ip_masq
        return Network(conflist, self.bin_dir)

    def _container(self, network: Network, name: str, ports: object = ()) -> Container:
        container = Container(network, name, ports)
        self._stack.callback(container.remove)
        return container

    @contextlib.contextmanager
    def publish(self, name: str, ports: object, protocol: str = "tcp", network: Network | None = None,
                **portmap: Any) -> Iterator[Container]:
        """One more container in the network, with a server on WEB; `portmap`: more of the plugin's configuration."""
        conflist = (network or self.network).conflist
        first, second = conflist["plugins"]
        network = Network({**conflist, "plugins": [first, {**second, **portmap}]}, self.bin_dir)
        container = Container(network, name, ports)
        try:
            container.check()
            with Server(name, container, WEB, protocol):
                yield container
        finally:
            container.remove()

    def ip(self, name: str, family: int) -> str:
        return self.addresses[name][family == 6]

    def try_path(self, path: Path, family: int, protocol: str, timeout: float = 2.5) -> str:
        """The name of the address that the container saw, NOBODY if it saw nothing or did not answer."""
        saw = exchange(self.places[path.who], self.ip(path.to, family), path.port, protocol,
                           self.ip(path.source, family) if path.source else "", timeout)
        if saw is None or saw.server != ("host" if path.port == OWN else "web"):
            return NOBODY
        names = (name for name in self.addresses if self.ip(name, family) == saw.peer)
        return next(names, saw.peer)


def _route_localhost(machine: Namespace) -> None:
    """Let a machine send 127.0.0.0/8 out to the host."""
    with machine:
        sysctl("net.ipv4.conf.eth0.route_localnet", 1)
        flush_addresses("lo")  # it has no localhost of its own any more
        if gateway := ipv4_gateway():
            add_route("127.0.0.0/8", gateway)
