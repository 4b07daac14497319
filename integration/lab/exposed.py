"""Exposure, as data: who reaches what of a container, by its mode; and the machines for it.

test_exposure.py asserts the table on a `Place`; docs/exposure.md says it in words.
"""
import concurrent.futures
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

from .links import add_addresses
from .namespaces import HOST, Netns, br_netfilter, fresh_host, sysctl, wire
from .packets import ping
from .runtime import CniFailed, Container, Network, bridge_conflist, call_plugin, ptp_conflist
from .servers import PATIENT, Server, exchange, patience
from .tables import nft_script

LAN = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}  # this host, the client
SECOND = {4: "203.0.113.9", 6: "2001:db8:113::9"}  # one more address of this host
TRUSTED = "to-lan-trusted"
OUT = 7777  # the client's port
MAPPINGS = [{"hostPort": 8080, "containerPort": 80}, {"hostPort": 5353, "containerPort": 80, "protocol": "udp"},
            *({"hostPort": 8443, "containerPort": 82, "hostIP": ip} for ip in ("127.0.0.1", "::1"))]
FRAGMENTED = 4000  # bytes


class Target(NamedTuple):
    """What somebody tries to reach: a port of this host or of the container; 0 for ping."""

    name: str
    host: bool
    port: int
    protocol: str = "tcp"


TARGETS = (Target("host:8080", True, 8080), Target("host:5353/udp", True, 5353, "udp"),
           Target("container:80", False, 80), Target("container:80/udp", False, 80, "udp"),
           Target("container:81, not published", False, 81), Target("container:82, on localhost only", False, 82),
           Target("ping", False, 0))
INSIDE = ("neighbour", "itself", "host")
WHO = ("LAN client", "client on a trusted interface", "container of another network", *INSIDE)


class Mode(NamedTuple):
    """What a configuration asks for, by its name; `keys` as they are in it."""

    name: str
    keys: dict[str, Any]

    def of(self, family: int) -> str:
        """The gateway mode of a family."""
        return str(self.keys.get(f"gatewayModeV{family}", "nat-unprotected"))


def _both(mode: str, **keys: Any) -> dict[str, Any]:
    return {"gatewayModeV4": mode, "gatewayModeV6": mode, **keys}


MODES = (
    Mode("no keys", {}),
    Mode("nat", _both("nat")),
    Mode("nat, allowDirectRouting", _both("nat", allowDirectRouting=True)),
    Mode("nat, trustedHostInterfaces", _both("nat", trustedHostInterfaces=[TRUSTED, "not-there"])),
    Mode("routed", _both("routed")),
    Mode("IPv4 nat, IPv6 routed", {"gatewayModeV4": "nat", "gatewayModeV6": "routed"}),
    Mode("isolated", _both("isolated")),
    Mode("nat, outgoing address", _both("nat", outgoingSourceV4=SECOND[4], outgoingSourceV6=SECOND[6])),
    Mode("nat, outgoing container", _both("nat", outgoingSourceV4="container", outgoingSourceV6="container")),
    Mode("outgoing address", {"outgoingSourceV4": SECOND[4], "outgoingSourceV6": SECOND[6]}),
)


class Setting(NamedTuple):
    """A kind of network for the container."""

    name: str
    plugin: str = "bridge"
    br_netfilter: bool = False


SETTINGS = (Setting("bridge"), Setting("bridge, br_netfilter", br_netfilter=True), Setting("ptp", "ptp"))


def reaches(mode: Mode, family: int, who: str, target: Target) -> bool:
    """Whether somebody should reach a target."""
    its = mode.of(family)
    if target.host:
        return its in ("nat", "nat-unprotected")
    if who in INSIDE or its == "nat-unprotected":
        return True
    if its == "nat":
        trusts = mode.keys.get("trustedHostInterfaces") and who == "client on a trusted interface"
        return bool((target.port == 80 and (mode.keys.get("allowDirectRouting") or trusts)) or
                    (target.port == 82 and trusts))
    return its == "routed" and target.port in (80, 0)


def out_as(mode: Mode, family: int, container: str) -> str:
    """Whom the client should see when the container goes out; "" for nobody. Its network masquerades it."""
    its = mode.of(family)
    source = mode.keys.get(f"outgoingSourceV{family}", "container" if its == "routed" else LAN[family][0])
    return "" if its == "isolated" else container if source == "container" else source


class Place:
    """A host with a LAN, another machine on a trusted interface, and a container that has a mode at a time.

    A context manager: until its end, its host is this thread's. `backend`: that of the bridge plugin's ipMasq, from
    1.9 on; "": the lab masquerades in its place.
    """

    def __init__(self, setting: Setting, bin_dir: pathlib.Path, backend: str = "") -> None:
        self.setting, self.bin_dir, self.backend = setting, bin_dir, backend

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(fresh_host())
        br_netfilter(self.setting.br_netfilter)
        for which in "all", "default":  # forged packets are the policy's to drop
            sysctl(f"net.ipv4.conf.{which}.rp_filter", 0)
        self.client = wire("lan-client", tuple(f"{LAN[f][0]}/{n}" for f, n in ((4, 24), (6, 64))),
                           tuple(f"{LAN[f][1]}/{n}" for f, n in ((4, 24), (6, 64))))
        self.trusted = wire("lan-trusted", ("198.51.100.1/24", "2001:db8:51::1/64"),
                            ("198.51.100.2/24", "2001:db8:51::2/64"))
        for machine in self.client, self.trusted:
            stack.callback(machine.remove)
        add_addresses("lo", *SECOND.values())
        self.network = self._network("home", "cni0", ("10.88.0.0/16", "fd88::/64"))
        self.container = Container(self.network, "container")
        self.neighbour = Container(self.network, "neighbour")
        self.stranger = Container(self._network("far", "cni1", ("10.89.0.0/16", "fd89::/64")), "stranger")
        for container in self.container, self.neighbour, self.stranger:
            stack.callback(_remove, container)
        if not self.backend:
            self._masquerade()
        for port in 80, 81, 82:
            stack.enter_context(Server("web", self.container, port))
        stack.enter_context(Server("web", self.container, 80, "udp"))
        stack.enter_context(Server("out", self.client, OUT))
        stack.enter_context(Server("out", self.client, OUT, "udp"))
        self._paths = {"LAN client": self.client.path, "client on a trusted interface": self.trusted.path,
                       "container of another network": self.stranger.namespace.path,
                       "neighbour": self.neighbour.namespace.path, "itself": self.container.namespace.path}
        self.ips = {4: self.container.ipv4, 6: self.container.ipv6}

    def _network(self, name: str, bridge: str, subnets: tuple[str, str]) -> Network:
        conflist = bridge_conflist(name, bridge, subnets) if self.setting.plugin == "bridge" else \
            ptp_conflist(name, subnets)
        if self.backend:
            conflist["plugins"][0] |= {"ipMasq": True, "ipMasqBackend": self.backend}
        return Network(conflist, self.bin_dir)

    def _masquerade(self) -> None:
        """What the network's own plugin does with ipMasq."""
        nft_script("table inet masq {", "chain postrouting { type nat hook postrouting priority srcnat;",
                   "ip saddr 10.88.0.0/16 ip daddr != 10.88.0.0/16 masquerade",
                   "ip6 saddr fd88::/64 ip6 daddr != fd88::/64 masquerade", "}; }")

    def call(self, verb: str, container: Container, keys: dict[str, Any], ports: object = ()) -> None:
        """A call of the plugin for a container; an isolated network has no ports. Raises CniFailed."""
        config = self.network.config(() if "isolated" in keys.values() else ports, container.result)
        call_plugin(self.bin_dir / "portmap", verb, {**config, **keys}, container.id, container.namespace.path)

    @contextlib.contextmanager
    def having(self, keys: dict[str, Any], ports: object = MAPPINGS) -> Iterator[None]:
        """The container, and its neighbour without ports, have a policy until the end of the block; CHECK sees it."""
        both = (self.container, ports), (self.neighbour, ())
        try:
            for verb in "ADD", "CHECK":
                for container, its in both:
                    self.call(verb, container, keys, its)
            yield
        finally:
            for container, _ in both:
                self.call("DEL", container, {})

    def place(self, who: str) -> contextlib.AbstractContextManager[object]:
        """The namespace that somebody is in: one object for each thread that enters it."""
        return Netns(self._paths[who]) if who in self._paths else HOST

    def reach(self, who: str, target: Target, family: int, timeout: float = PATIENT, size: int = 9) -> bool:
        """Whether somebody reaches a target now."""
        ip = LAN[family][0] if target.host else self.ips[family]
        if not target.port:
            return ping(self.place(who), ip, timeout)
        saw = exchange(self.place(who), ip, target.port, target.protocol, timeout=timeout, size=size)
        return saw is not None and saw.server == "web"

    def out(self, family: int, protocol: str = "tcp", timeout: float = PATIENT) -> str:
        """The address that the client sees of the container, "" for nobody."""
        saw = exchange(self.place("itself"), LAN[family][1], OUT, protocol, timeout=timeout)
        return saw.peer if saw else ""

    def table(self, mode: Mode) -> dict[tuple[str, str, int], object]:
        """Who reaches what, and as whom the container goes out: (who, what, family) -> what is seen."""
        found: dict[tuple[str, str, int], concurrent.futures.Future[object]] = {}
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # its threads are born on this host
            for family in 4, 6:
                for who in WHO:
                    for target in TARGETS:
                        seconds = patience(reaches(mode, family, who, target))
                        size = FRAGMENTED if target.protocol == "udp" else 9
                        found[who, target.name, family] = pool.submit(self.reach, who, target, family, seconds, size)
                for protocol in "tcp", "udp":
                    seconds = patience(out_as(mode, family, "itself"))
                    found["itself", f"out, {protocol}", family] = pool.submit(self.out, family, protocol, seconds)
        return {case: each.result() for case, each in found.items()}

    def too_open(self, mode: Mode) -> dict[tuple[str, str, int], object]:
        """The cases that are open and should not be, and published ports that should answer and do not."""
        seen, wanted = self.table(mode), self.wanted(mode)
        return {case: each for case, each in seen.items()
                if each != wanted[case] and (each or case[1].startswith("host:"))}

    def wanted(self, mode: Mode) -> dict[tuple[str, str, int], object]:
        """The same, as it should be."""
        found: dict[tuple[str, str, int], object] = {
            (who, target.name, family): reaches(mode, family, who, target)
            for family in (4, 6) for who in WHO for target in TARGETS}
        for family in 4, 6:
            for protocol in "tcp", "udp":
                found["itself", f"out, {protocol}", family] = out_as(mode, family, self.ips[family])
        return found


def _remove(container: Container) -> None:
    try:
        container.remove()
    except CniFailed as error:  # with ipMasq by nftables alone, iptables 1.8.9 has no words that it understands
        if error.plugin != "bridge":
            raise
        container.namespace.remove()
