"""A site: a published container in a network of some kind, and the machines around it that connect to it."""
import concurrent.futures
import contextlib
import copy
import ipaddress
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Self

from .links import (
    add_addresses,
    add_bridge,
    add_route,
    bring_up,
    enslave,
    flush_addresses,
    ipv4_gateway,
    isolate,
)
from .namespaces import HOST, Namespace, br_netfilter, fresh_host, sysctl, wire
from .packets import inject, packet
from .paths import (
    ADDRESSES,
    EVERY,
    LAN,
    LAN_SUBNETS,
    LOCAL,
    NOBODY,
    OWN,
    PATHS,
    WEB,
    Path,
    Setting,
    exists,
    expected,
)
from .runtime import Container, Network, bridge_conflist, ptp_conflist
from .processes import until
from .servers import PATIENT, Server, exchange, patience, question


Place = contextlib.AbstractContextManager[object]  # to be entered, as HOST, a Namespace and a Container are


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
        self._ports = itertools.count(40000)  # of senders, so that each datagram is the first of a flow

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
        self.places: dict[str, Place] = {"host": HOST}
        self.devices: dict[str, str] = {}  # the host's interfaces that their frames arrive at
        self._make_lan()
        self._make_containers()
        self.servers: dict[tuple[int, int, str], Server] = {}  # by port (of EVERY or OWN), family and protocol
        for protocol in "tcp", "udp":
            web = self._stack.enter_context(Server("web", self.container, WEB, protocol))
            for family, ip in zip((4, 6), ADDRESSES["localhost"]):
                self.servers[EVERY, family, protocol] = web
                own = self._stack.enter_context(Server("host", HOST, OWN, protocol, ip))
                self.servers[OWN, family, protocol] = own
        self._address("address added after ADD")

    def _make_lan(self) -> None:
        """The machines that are wired to the host, and a bridge where the plugin cannot make it as it is to be."""
        lan = [f"{ip}/{length}" for ip, length in zip(ADDRESSES["LAN address"], (24, 64))]
        self.client = self._wire("client", "lan-client", tuple(lan), ("192.0.2.2/24", "2001:db8::2/64"))
        hostile = self._wire("hostile machine", "lan-hostile", ("192.0.3.1/24",), ("192.0.3.2/24",))
        admins = self._wire("administrator's machine", "admin", ("192.0.4.1/24",), ("192.0.4.2/24",), "loopback0")
        with self.client:
            sysctl("net.ipv4.ip_forward", 1)
            sysctl("net.ipv6.conf.all.forwarding", 1)
            far = wire("far-client", ("198.51.101.1/24", "2001:db8:101::1/64"),
                       tuple(f"{ip}/{length}" for ip, length in zip(ADDRESSES["far client"], (24, 64))))
        self._stack.callback(_remove_behind, self.client, far)
        self.places["far client"] = far
        for machine in hostile, admins:
            _route_localhost(machine)
        for interface in filter(None, ("loopback0", self.setting.localnet)):
            sysctl(f"net.ipv4.conf.{interface}.route_localnet", 1)
        if self.setting.uplink:
            flush_addresses("to-lan-client")
            self._bridge("cni0", *lan)
            enslave("to-lan-client", "cni0")
            self.devices["client"] = "cni0"
        elif len(self.setting.subnets) > 2:  # the plugin gives a bridge one address of a family
            self._bridge("cni0", *map(_first, self.setting.subnets))
        elif self.setting.subnets == LAN_SUBNETS:
            with self.client:  # or it would look for it in the LAN
                add_route("2001:db8::99/128", "2001:db8::1")
        for network, gateway in ("198.51.101.0/24", "192.0.2.2"), ("2001:db8:101::/64", "2001:db8::2"):
            add_route(network, gateway)
        self._address("second address")

    def _make_containers(self) -> None:
        self.network = self._network("home", "cni0", self.setting.subnets)
        self.far = self._network("far", "cni1", ("10.89.0.0/16", "fd89::/64"))
        self.container = self._container(self.network, "container", _mappings())
        if self.setting.second_network:
            self._join(self.far)
        neighbour = self._container(self.network, "neighbour")
        mean = self._container(self.network, "hostile neighbour")
        self._container(self.far, "stranger")
        _route_localhost(mean.namespace, ADDRESSES["LAN address"][0] if self.setting.uplink else "")
        gateways = [entry["gateway"] for entry in self.container.result["ips"]]
        self.addresses["bridge address"] = self.addresses["LAN address"] if self.setting.uplink else \
            (_of_family(gateways, 4), _of_family(gateways, 6))
        if len(self.setting.subnets) > 2:
            for name, whose in ("container's other address", self.container), ("neighbour's other address", neighbour):
                self.addresses[name] = whose.other_ipv4, whose.other_ipv6

    def _wire(self, who: str, name: str, host_ips: tuple[str, ...], their_ips: tuple[str, ...],
              device: str = "") -> Namespace:
        machine = wire(name, host_ips, their_ips, device)
        self._stack.callback(machine.remove)
        self.places[who], self.devices[who] = machine, machine.host_device
        return machine

    def _address(self, name: str) -> None:
        add_addresses("lo", *ADDRESSES[name])

    def _network(self, name: str, bridge: str, subnets: tuple[str, ...]) -> Network:
        wanted = tuple(subnet for subnet in subnets if (6 if ":" in subnet else 4) in self.setting.families)
        conflist = bridge_conflist(name, bridge, wanted, **self.portmap) if self.setting.plugin == "bridge" else \
            ptp_conflist(name, wanted, **self.portmap)
        first = conflist["plugins"][0]
        first["ipMasq"] = self.setting.ip_masq
        if bridge == "cni0" and (self.setting.uplink or len(subnets) > 2):
            first["isGateway"] = False  # it has its addresses
        if subnets == LAN_SUBNETS:
            (four,), (six,) = first["ipam"]["ranges"]
            gateway = {"": ("192.0.2.99", "2001:db8::99"), "host": ADDRESSES["LAN address"],
                       "client": ADDRESSES["client"]}[self.setting.uplink]
            four |= {"rangeStart": "192.0.2.128", "gateway": gateway[0]}
            six |= {"rangeStart": "2001:db8::8000", "gateway": gateway[1]}
        return Network(conflist, self.bin_dir)

    def _bridge(self, name: str, *ips: str) -> None:
        add_bridge(name)
        bring_up(name, *ips)

    def _join(self, network: Network) -> None:
        """Put the container into a second network, as podman does: its ports are published there, too."""
        conflist = copy.deepcopy(network.conflist)
        conflist["plugins"][0]["ipam"]["routes"] = []  # the first has the default route
        self.second = self.container.join(Network(conflist, self.bin_dir), "eth1")
        self.addresses["container's other address"] = self.second.ipv4, self.second.ipv6
        self._stack.callback(self.second.leave)

    def _container(self, network: Network, who: str, ports: object = ()) -> Container:
        container = Container(network, who.replace(" ", "-"), ports)
        self._stack.callback(container.remove)
        self.places[who], self.devices[who] = container, container.interface
        self.addresses[who] = container.ipv4, container.ipv6
        if self.setting.isolated:
            isolate(container.link)
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

    def arrival(self, who: str, source: str, destination: str, port: int, comes: object) -> str:
        """Whom the server of a port sees of a datagram that `who` makes by hand, NOBODY if it never arrives.

        `comes`: whether it should arrive, and so is waited for; else one that follows it tells when to look.
        """
        family, own, data = 6 if ":" in destination else 4, OWN if port == OWN else EVERY, question()
        server, machine = self.servers[own, family, "udp"], self.places[who]
        inject(machine, self.devices[who], packet(source, destination, port, source_port=next(self._ports), data=data))
        if comes:
            until(lambda: server.saw(data), PATIENT)
        else:
            assert exchange(HOST, self.ip("localhost" if own == OWN else "LAN address", family), own, "udp")
        saw = server.saw(data)
        return saw.peer if saw else NOBODY

    def try_path(self, path: Path, family: int, protocol: str, timeout: float = PATIENT) -> str:
        """The name of the address that the container saw, NOBODY if it saw nothing or did not answer."""
        saw = exchange(self.places[path.who], self.ip(path.to, family), path.port, protocol,
                           self.ip(path.source, family) if path.source else "", timeout)
        if saw is None or saw.server != ("host" if path.port == OWN else "web"):
            return NOBODY
        names = (name for name in self.addresses if self.ip(name, family) == saw.peer)
        return next(names, saw.peer)

    def answers(self, path: Path, family: int, protocol: str) -> str:
        """Whom the container sees where nothing is in the way."""
        return expected(path, self.setting, family)

    def answers_host(self, path: Path, family: int, protocol: str) -> str:
        """Whom the container sees where nothing is forwarded: this host's own connections arrive."""
        return self.answers(path, family, protocol) if path.who == "host" else NOBODY

    def differences(self, wanted: Callable[[Path, int, str], str] | None = None) -> dict[str, tuple[str, str]]:
        """All paths at once: those where the container sees somebody else than `wanted` says, with both.

        `wanted`: of a path, a family and a protocol; `answers` if it is not given. Not those to the host's own service
        that an administrator has opened: of what is not published, firewalls have another opinion.
        """
        wanted = wanted or self.answers
        cases = [(path, family, protocol) for path in PATHS for family in (4, 6) for protocol in ("tcp", "udp")
                 if exists(path, self.setting, family) and not (path.port == OWN and path.sees)]
        hopes = [wanted(*case) for case in cases]

        def see(case: tuple[Path, int, str], hope: str) -> str:
            return self.try_path(*case, timeout=patience(hope))
        with concurrent.futures.ThreadPoolExecutor(32) as side_by_side:
            saw = side_by_side.map(see, cases, hopes)
            return {f"{path}, IPv{family}, {protocol}": (hope, seen)
                    for (path, family, protocol), hope, seen in zip(cases, hopes, saw, strict=True) if seen != hope}


def _first(subnet: str) -> str:
    """The first address of a subnet, with its length."""
    network = ipaddress.ip_network(subnet)
    return f"{network[1]}/{network.prefixlen}"


def _of_family(ips: list[str], family: int) -> str:
    return next((ip for ip in ips if (":" in ip) == (family == 6)), "")


def _remove_behind(router: Namespace, machine: Namespace) -> None:
    with router:
        machine.remove()


def _route_localhost(machine: Namespace, host: str = "") -> None:
    """Let a machine send 127.0.0.0/8 out to the host, which is its gateway where `host` does not say its address."""
    with machine:
        sysctl("net.ipv4.conf.eth0.route_localnet", 1)
        flush_addresses("lo")  # it has no localhost of its own any more
        if gateway := host or ipv4_gateway():
            add_route("127.0.0.0/8", gateway)
