"""The values that everything is about: an attachment, its addresses, its published ports; how an address is read.

Source of the words: containernetworking/cni SPEC.md, "attachment"; inet_pton(3).
"""
from _socket import AF_INET, AF_INET6, inet_ntop, inet_pton

from .cni import ConfigError

AF = {4: AF_INET, 6: AF_INET6}
PROTOCOLS = ("tcp", "udp", "sctp")
DEFAULT_MARK_BIT = 13  # the reference plugin's


class Address:
    """An address of the container: `family` 4 or 6, `ip` in canonical text, `network` it is in ("10.88.0.0/16")."""

    __slots__ = ("family", "ip", "network")

    def __init__(self, family: int, ip: str, network: str) -> None:
        self.family, self.ip, self.network = family, ip, network


class Port:
    """One published port: `host_ip` ("" for every address of the family) and `host_port` lead to `container_port`.

    `key`: see `ruleset.key_of`.
    """

    __slots__ = ("family", "protocol", "host_ip", "host_port", "container_port", "key")

    def __init__(self, family: int, protocol: str, host_ip: str, host_port: int, container_port: int) -> None:
        self.family, self.protocol, self.host_ip = family, protocol, host_ip
        self.host_port, self.container_port, self.key = host_port, container_port, b""

    def __str__(self) -> str:
        ip = self.host_ip or ("0.0.0.0" if self.family == 4 else "::")
        return f"{self.protocol} port {self.host_port} on {ip}"


class Exposure:
    """Who may reach a container's addresses of one family, and as whom it goes out; see docs/exposure.md.

    `mode`: of gatewayModeV4 or V6; `ips`: all addresses of the family, in `networks`. `opened`: the ports (protocol,
    container port) that everybody reaches there; `trusted`: those that the `interfaces` (names) of this host reach.
    `conditions`: nft match text for both. `outgoing`: the source that the world sees, "container", or "" where that is
    left to others.

    What the host knows of it: `home`: the interfaces that lead to the container's own network; `is_routed`: whether its
    neighbours are behind others, as with ptp. `note`: all of that, for the owner's record.
    """

    __slots__ = ("family", "mode", "ips", "networks", "opened", "trusted", "interfaces", "conditions", "outgoing",
                 "home", "is_routed", "note")

    def __init__(self, family: int, mode: str, ips: tuple[str, ...], *, networks: tuple[str, ...] = (),
                 opened: tuple[tuple[str, int], ...] = (), trusted: tuple[tuple[str, int], ...] = (),
                 interfaces: tuple[str, ...] = (), conditions: str = "", outgoing: str = "",
                 home: tuple[str, ...] = (), is_routed: bool = False) -> None:
        self.family, self.mode, self.ips, self.networks = family, mode, ips, networks
        self.opened, self.trusted, self.interfaces = opened, trusted, interfaces
        self.conditions, self.outgoing = conditions, outgoing
        self.home, self.is_routed, self.note = home, is_routed, ""


class Attachment:
    """A container's interface in a network, and all that it publishes.

    `netns`: path of the container's network namespace, or ""; `inode`: what it led to, 0 where that is not known.
    `addresses`: by family. `mark_bit`: 0 to 31, or None where nothing is masqueraded; `masq_all`: everybody is.
    `conditions`: nft match text by family. `localhost6`: whether [::1] is opened. `refuse_port_in_use`: whether a port
    that a process of the host uses is refused. `pod`: the name that people know, "shop/web-7d9f", or "". `links`: the
    interfaces of the host that prevResult names, of which `link` is the container's own, as name#index, or "".
    `prefixes`: the networks of all of its addresses. `exposure`: who may reach its addresses besides what
    `ports` publish; a family that only `exposure` has is not in `addresses`. `by_operator`: whether `cni-portmap
    publish` has published `ports`, and no runtime.

    What the host knows of it: `on_link`: (interface of this host, prefix), from where its replies do not come back
    through this host; None if that goes by prefix alone, as before 0.2. `left_alone`: the families whose localhost its
    ports do not take; `ways`: by family, the interface that localhost leads through.
    """

    __slots__ = ("container_id", "ifname", "network", "netns", "inode", "addresses", "ports", "mark_bit",
                 "masq_all", "conditions", "localhost6", "refuse_port_in_use", "pod", "links", "link",
                 "prefixes", "exposure", "on_link", "left_alone", "ways", "by_operator")

    def __init__(self, container_id: str, ifname: str, network: str, *, netns: str = "", inode: int = 0,
                 addresses: dict[int, Address] | None = None, ports: tuple[Port, ...] = (),
                 mark_bit: int | None = None, masq_all: bool = False,
                 conditions: dict[int, str] | None = None, localhost6: bool = True,
                 refuse_port_in_use: bool = False, pod: str = "", links: tuple[str, ...] = (), link: str = "",
                 prefixes: tuple[str, ...] = (), exposure: tuple[Exposure, ...] = (),
                 on_link: tuple[tuple[str, str], ...] | None = (),
                 left_alone: frozenset[int] = frozenset(), ways: dict[int, str] | None = None) -> None:
        self.container_id, self.ifname, self.network = container_id, ifname, network
        self.netns, self.inode = netns, inode
        self.addresses, self.ports = addresses or {}, ports
        self.mark_bit, self.masq_all, self.conditions = mark_bit, masq_all, conditions or {}
        self.localhost6, self.refuse_port_in_use = localhost6, refuse_port_in_use
        self.pod, self.links, self.link = pod, links, link
        self.prefixes, self.exposure = prefixes, exposure
        self.by_operator = False
        self.on_link, self.left_alone, self.ways = on_link, left_alone, ways or {}


_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, IPv4-mapped IPv6 (RFC 4291, 2.5.5.2)


def parse_ip(text: object, path: str) -> tuple[int, str]:
    """Family (4 or 6) and canonical text of an address; IPv4-mapped IPv6 is IPv4."""
    if type(text) is not str:
        raise ConfigError(path)
    for family, kind in (4, AF_INET), (6, AF_INET6):
        try:
            packed = inet_pton(kind, text)
        except (OSError, ValueError):  # ValueError: NUL or a lone surrogate in the text
            continue
        if packed[:12] == _MAPPED:
            return 4, inet_ntop(AF_INET, packed[12:])
        return family, inet_ntop(kind, packed)
    raise ConfigError(path)


def is_localhost(ip: str) -> bool:
    """Whether an address (canonical text) is one of this host's localhost."""
    return ip == "::1" or ip.startswith("127.")


def parse_cidr(text: object, path: str) -> Address:
    """An address with its prefix length, as IPAM plugins write it: "10.88.0.2/16"."""
    if type(text) is not str:
        raise ConfigError(path)
    host, _, length = text.partition("/")
    family, ip = parse_ip(host, path)
    if not (length.isascii() and length.isdigit() and len(length) < 4):
        raise ConfigError(path)
    kind, bits = (AF_INET, 32) if family == 4 else (AF_INET6, 128)
    prefix = int(length) - 96 if family == 4 and ":" in host else int(length)
    if not 0 <= prefix <= bits:
        raise ConfigError(path)
    number = int.from_bytes(inet_pton(kind, ip), "big") >> bits - prefix << bits - prefix
    return Address(family, ip, f"{inet_ntop(kind, number.to_bytes(bits // 8, 'big'))}/{prefix}")
