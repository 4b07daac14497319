"""What the checks look at: the port, the host, the container, and the ways between them. Read once, and when asked for.

Nothing in the kernel is changed by any of it.
"""
import ipaddress
from collections.abc import Iterator
from typing import Any, NamedTuple

from ... import ruleset
from ...attachment import is_localhost
from ...firewall.claims import Claim
from ...firewall.journey import Journey, Traveller
from ...firewall.packet import Packet
from ...firewall.walk import Walker
from ...libcni_cache import Memory, conflist_of, documents
from ...linux.host import RTN_LOCAL, Host, Link, Listener, inside, listeners, sysctl
from ...linux.kernel import Kernel
from ...linux.rulesets import Chain, Rulesets
from ...ruleset import PROTOCOL_NUMBERS
from ...verbs.exposed import exposed
from ...verbs.published import Published, published
from .finding import HOST, LOCALHOST, OUTSIDE

EXAMPLES = {4: ipaddress.ip_address("192.0.2.1").packed, 6: ipaddress.ip_address("2001:db8:ffff::1").packed}
LOCAL = {4: b"\x7f\0\0\1", 6: bytes(15) + b"\1"}
EVERY = {4: "0.0.0.0", 6: "::"}


def packed(text: str) -> bytes:
    """An address, packed."""
    return ipaddress.ip_address(text).packed


def shown(address: bytes | None) -> str:
    """An address, as people write it; "" for none."""
    return str(ipaddress.ip_address(address)) if address else ""


def end(ip: str, port: int) -> str:
    """An address and a port, as people write them."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Target(NamedTuple):
    """One published port of one family, as the kernel has it. `container_ip`: "" where the rule is missing."""

    family: int
    protocol: str
    host_ip: str
    port: int
    container_ip: str
    container_port: int
    line: Published

    @property
    def is_wildcard(self) -> bool:
        """Whether it is published on every address."""
        return self.host_ip == EVERY[self.family]

    @property
    def is_localhost(self) -> bool:
        """Whether it is published on this host's localhost alone."""
        return is_localhost(self.host_ip)

    @property
    def number(self) -> int:
        """The protocol's number."""
        return PROTOCOL_NUMBERS.get(self.protocol, 0)

    @property
    def chain(self) -> str:
        """The chain of its owner."""
        by = ruleset.BY_OPERATOR if self.line.by == "operator" else ruleset.BY_RUNTIME
        return ruleset.chain_of(self.line.container_id, self.line.ifname, by)

    @property
    def name(self) -> str:
        """The container, as people know it."""
        return self.line.pod or self.line.container_id[:24]

    def __str__(self) -> str:
        return f"{end(self.host_ip, self.port)}/{self.protocol}"

    @property
    def label(self) -> str:
        """The port for a summary: one address is named, every address is not."""
        return f"{self.port}/{self.protocol}" if self.is_wildcard else str(self)


class Inside(NamedTuple):
    """The container's network namespace; `error`: why it could not be looked at, "" if it could."""

    host: Host | None
    listeners: dict[str, list[Listener]]
    error: str


class Trip(NamedTuple):
    """A way to the port, and what happens there. `path`: OUTSIDE, HOST or LOCALHOST; `packet`: the first."""

    path: str
    packet: Packet
    journey: Journey

    def __str__(self) -> str:
        return f"from outside on {self.packet.iif}" if self.path == OUTSIDE else "from this host" \
            if self.path == HOST else "from this host's localhost"


class Scene:
    """All of it. `port`: None for the host in general; `client`, `to`: addresses, packed, None where not given."""

    def __init__(self, kernel: Kernel, port: int | None, protocol: str, client: bytes | None, to: bytes | None) -> None:
        self.kernel, self.port, self.client, self.to = kernel, port, client, to
        self.host = Host()
        self.rulesets = Rulesets()
        self.walker = Walker(self.rulesets, self.host)
        self.lines = published(kernel)
        self.asked = protocol
        self.targets = [target for target in self._targets() if port is None or target.port == port]
        protocols = {target.protocol for target in self.targets}
        if protocol:
            self.targets = [target for target in self.targets if target.protocol == protocol]
        self.other_protocols = sorted(protocols - {protocol}) if protocol and not self.targets else []
        self.protocol = protocol or (self.targets[0].protocol if self.targets else "tcp")
        self.memory: Memory | None = None  # what libcni has cached
        self._documents: list[dict[str, Any]] | None = None  # the same, as it is written
        self.claims: list[Claim] | None = None  # others' DNAT rules
        self.here: dict[str, list[Listener]] = {}  # this host's own sockets, by protocol
        self.texts: dict[tuple[str, str, str], dict[int, str]] = {}  # of chains of nft: rules by handle
        self._sysctls: dict[str, str] = {}
        self._inside: dict[str, Inside] = {}
        self._trips: dict[tuple[object, ...], list[Trip]] = {}
        self.reached = {self.host.route(line.family, packed(line.container_ip)).link
                        for line in self.lines if line.container_ip} - {""}

    def sysctl(self, name: str) -> str:
        """The value of a sysctl of this host, "" where there is none. `name`: with slashes."""
        if name not in self._sysctls:
            self._sysctls[name] = sysctl(name)
        return self._sysctls[name]

    def _targets(self) -> Iterator[Target]:
        for line in self.lines:
            ports = zip(line.host_ports, line.container_ports, strict=True)
            for host_port, container_port in ports:
                if self.port is None or host_port == self.port:
                    yield Target(line.family, line.protocol, line.host_ip, host_port, line.container_ip,
                                 container_port, line)
                    if self.port is None:  # the other ports of a line have the same ways
                        break

    def direct(self, target: Target | None, number: int) -> list[Trip]:
        """The ways of other machines to a container's own address, past what is published: `to` without a target."""
        ip = packed(target.container_ip) if target else self.to or b""
        family, protocol = (4 if len(ip) == 4 else 6), PROTOCOL_NUMBERS[self.protocol]
        traveller = Traveller(self.walker, self.host)
        packets = [Packet(family, protocol, self.client, ip, number, iif=name) for name, _ in self.uplinks(family)]
        return [Trip(OUTSIDE, packet.copy(), traveller.travel(packet)) for packet in packets]

    @property
    def asks_container(self) -> str:
        """The container's own address, where that is what is asked (`to`); "" for an address of this host."""
        own = {line.container_ip for line in self.lines}
        if self.to and shown(self.to) not in own and any(self.is_ours(chain) and chain.name == "exposure"
                                                         for chain in self.rulesets.chains):
            own |= {ip for line in exposed(self.kernel) for ip in line.addresses}
        return shown(self.to) if shown(self.to) in own else ""

    def subject(self, target: Target) -> str:
        """What a finding about this host's ways is about: the port, or all that goes that way."""
        return target.label if self.port is not None else "published ports"

    # --- the container ---

    def inside(self, target: Target) -> Inside:
        """The container's network namespace."""
        path = target.line.netns
        if path not in self._inside:
            self._inside[path] = self._look_inside(path)
        return self._inside[path]

    def _look_inside(self, path: str) -> Inside:
        if not path:
            return Inside(None, {}, "its path is not known")
        try:
            with inside(path):
                return Inside(Host(), {protocol: listeners(protocol) for protocol in self._protocols()}, "")
        except OSError as error:
            return Inside(None, {}, error.strerror or str(error))

    def remembered(self, target: Target) -> dict[str, Any]:
        """The file in which libcni remembers the container's interface, {} for none."""
        if self._documents is None:
            self._documents = documents()
        its = target.line.container_id, target.line.ifname
        return next((each for each in self._documents if (each.get("containerId"), each.get("ifName")) == its), {})

    def connector(self, target: Target) -> dict[str, Any]:
        """The configuration of the plugin that has made the container's interface, {} where it is not known."""
        try:
            conflist = conflist_of(self.remembered(target))
            found = conflist.get("plugins", [conflist])[0]
        except (AttributeError, LookupError, TypeError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _protocols(self) -> list[str]:
        return sorted({target.protocol for target in self.targets})

    def route(self, target: Target) -> str:
        """The interface of this host that leads to the container, "" for none."""
        return self.host.route(target.family, packed(target.container_ip)).link if target.container_ip else ""

    def host_end(self, target: Target) -> Link | None:
        """This host's end of the container's link, None where there is none, or it cannot be told."""
        found = self.inside(target)
        link = found.host.link(target.line.ifname) if found.host else None
        name = self.host.name_of(link.peer) if link and link.peer and link.kind in ("veth", "netkit") else ""
        its = self.host.link(name)
        return its if its and its.kind in ("veth", "netkit") else None

    # --- the ways in ---

    def uplinks(self, family: int) -> list[tuple[str, bytes]]:
        """The interfaces that clients come in on, each with this host's address there."""
        found: dict[str, bytes] = {}
        for address in self.host.addresses:
            link = self.host.link(address.link)
            if link and address.family == family and link.is_up and not link.is_loopback and \
                    not address.is_link_local and not self._leads_to_containers(link):
                found.setdefault(link.name, address.ip)
        return [*found.items()]

    def _leads_to_containers(self, link: Link) -> bool:
        return link.name in self.reached and (link.kind in ("bridge", "veth", "netkit"))

    def ways_in(self, target: Target) -> list[tuple[str, bytes]]:
        """The interfaces that packets for a port come in on, each with the address that they ask for."""
        family = target.family
        if target.is_localhost:
            return []
        ways = self.uplinks(family)
        if self.to is not None and len(self.to) != (4 if family == 4 else 16):
            return []
        if self.to is not None and (self.is_own(self.to) or self.asks_container):  # or another machine translates it
            here = [address.link for address in self.host.addresses if address.ip == self.to]
            ways = [(name, self.to) for name, _ in ways if name in here] or [(name, self.to) for name, _ in ways]
        elif not target.is_wildcard:
            wanted = packed(target.host_ip)
            here = [address.link for address in self.host.addresses if address.ip == wanted]
            ways = [(name, wanted) for name, _ in ways if name in here] or [(name, wanted) for name, _ in ways]
        if self.client is None:
            return ways
        if len(self.client) != (4 if family == 4 else 16):
            return []
        if self.is_own(self.client):  # no other machine asks
            return []
        near = [address.link for address in self.host.addresses
                if address.family == family and address.has(self.client) and not address.is_link_local]
        route = self.host.route(family, self.client).link
        if (link := self.host.link(route)) and self._leads_to_containers(link):  # a container asks: on its own bridge
            own = [(each.link, each.ip) for each in self.host.addresses if each.link == route
                   and each.family == family and not each.is_link_local]
            return [(route, ip) for _, ip in (ways or own)[:1]]
        if self.to is not None and len(ways) == 1:
            return ways
        return [way for way in ways if way[0] in near] or [way for way in ways if way[0] == route] or ways

    def trips(self, target: Target) -> list[Trip]:
        """All ways to a port, and what the rules do there."""
        key = target.family, target.protocol, target.host_ip, target.port, target.container_ip
        if key not in self._trips:
            traveller = Traveller(self.walker, self.host)
            self._trips[key] = [Trip(path, packet.copy(), traveller.travel(packet))
                                for path, packet in self._packets(target)]
        return self._trips[key]

    def _packets(self, target: Target) -> Iterator[tuple[str, Packet]]:
        family, number, port = target.family, target.number, target.port
        for name, ip in self.ways_in(target):
            yield OUTSIDE, Packet(family, number, self.client, ip, port, iif=name)
        if self.client is not None and not self.is_own(self.client):
            return
        is_loopback = self.client is not None and ipaddress.ip_address(self.client).is_loopback
        own = next((ip for _, ip in self.uplinks(family)), None) if target.is_wildcard else packed(target.host_ip)
        if own and not target.is_localhost and not is_loopback and self.host.type_of(family, own) == RTN_LOCAL:
            yield HOST, Packet(family, number, own, own, port, local=True)
        if (target.is_wildcard or target.is_localhost) and not self.leaves_localhost_alone(target):
            ip = LOCAL[family] if target.is_wildcard else packed(target.host_ip)
            yield LOCALHOST, Packet(family, number, LOCAL[family], ip, port, local=True)

    def is_own(self, ip: bytes) -> bool:
        """Whether an address is this host's."""
        return self.host.type_of(4 if len(ip) == 4 else 6, ip) == RTN_LOCAL

    def leaves_localhost_alone(self, target: Target) -> bool:
        """Whether the port is not published on this host's localhost, by choice or since that cannot work there."""
        comments = self.kernel.comments(target.chain)
        return target.family in ruleset.left_alone_of(comments) or not self.is_masqueraded(target)

    def is_masqueraded(self, target: Target) -> bool:
        """Whether the attachment marks any client for masquerading (snat: true)."""
        return any(b"meta\0" in raw and b"bitwise\0" in raw for _, _, raw, _ in self.kernel.rules(target.chain))

    def is_ours(self, chain: Chain) -> bool:
        """Whether a chain is of this plugin's table."""
        return (chain.family, chain.table) == ("inet", ruleset.TABLE_NAME)
