"""A packet that has not been sent: its headers byte by byte, known or not, and its connection."""
from typing import NamedTuple, Protocol

from ..linux.host import Link

YES, NO, MAYBE = "yes", "no", "maybe"
Bytes = list[int | None]  # each byte, None where it is not known

TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
SYN, ACK = 0x02, 0x10
EPHEMERAL = 54321  # a client's port is not known, but hardly ever one that a rule names
NEW, ESTABLISHED, UNTRACKED = "new", "established", "untracked"
IPS_SRC_NAT, IPS_DST_NAT = 0x10, 0x20
ETHERTYPES = {4: 0x0800, 6: 0x86dd}


class Tuple(NamedTuple):
    """One direction of a connection, addresses packed; None for what is not known."""

    source: bytes | None
    sport: int
    destination: bytes | None
    dport: int


class Facts(Protocol):
    """What rules ask about this host, see `linux.host.Host`: addresses are packed, interfaces are names."""

    def link(self, name: str) -> Link | None:
        """The interface of a name."""

    def type_of(self, family: int, ip: bytes, link: str = "") -> int:
        """What an address is for this host, an RTN_* number; `link`: as that interface has it."""

    def route_to(self, family: int, ip: bytes, mark: int = 0) -> str:
        """The interface that leads to an address."""

    def address_of(self, link: str, family: int) -> bytes | None:
        """The address that an interface's packets come from."""


class Packet:
    """A packet at some hook. `iif`, `oif`: names, "" for none. `mark`: None where it is not known. `flags`: of TCP.

    `state`: NEW, ESTABLISHED or UNTRACKED; `reply`: whether its direction is the reply's; `original` and `replies`: the
    tuples of its connection (`replies`: where its answers come from and go to); `status`: IPS_* bits. `local`: whether
    a process of this host sends it. `bridged`: whether it crosses a bridge where br_netfilter is on.
    `may_be_untracked`: whether a rule may let it pass connection tracking by.
    """

    __slots__ = ("family", "protocol", "source", "sport", "destination", "dport", "flags", "iif", "oif", "state",
                 "reply", "original", "replies", "status", "mark", "ct_mark", "local", "bridged", "may_be_untracked")

    def __init__(self, family: int, protocol: int, source: bytes | None, destination: bytes | None, dport: int, *,
                 sport: int = EPHEMERAL, iif: str = "", oif: str = "", local: bool = False) -> None:
        self.family, self.protocol = family, protocol
        self.source, self.sport, self.destination, self.dport = source, sport, destination, dport
        self.flags = SYN
        self.iif, self.oif, self.local, self.bridged = iif, oif, local, False
        self.may_be_untracked = False
        self.state, self.reply, self.status = NEW, False, 0
        self.original = Tuple(source, sport, destination, dport)
        self.replies = Tuple(destination, dport, source, sport)
        self.mark: int | None = 0
        self.ct_mark: int | None = 0

    def copy(self) -> "Packet":
        """The same again."""
        other = Packet.__new__(Packet)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def translate(self, destination: bytes | None, port: int) -> None:
        """Change the destination of the first packet of a connection, and so where its answers come from."""
        self.destination, self.dport = destination, port
        self.replies = self.replies._replace(source=destination, sport=port)
        self.status |= IPS_DST_NAT

    def hide(self, source: bytes | None) -> None:
        """Change the source of the first packet of a connection, and so where its answers go."""
        self.source = source
        self.replies = self.replies._replace(destination=source)
        self.status |= IPS_SRC_NAT

    def header(self, base: int) -> Bytes:
        """The bytes of the link, network or transport header (NFT_PAYLOAD_*_HEADER: 0, 1, 2)."""
        if base == 0:
            kind = ETHERTYPES[self.family]
            return [*[None] * 12, kind >> 8, kind & 255]
        if base == 1:
            return self._network()
        ports: Bytes = [self.sport >> 8, self.sport & 255, self.dport >> 8, self.dport & 255]
        if self.protocol == TCP:
            acknowledged: Bytes = [0] * 4 if self.flags == SYN else [None] * 4
            return [*ports, *[None] * 4, *acknowledged, None, self.flags, *[None] * 4, 0, 0]
        return [*ports, *[None] * (4 if self.protocol == UDP else 8)]

    def _network(self) -> Bytes:
        size = 4 if self.family == 4 else 16
        source: Bytes = [None] * size if self.source is None else [*self.source]
        destination: Bytes = [None] * size if self.destination is None else [*self.destination]
        if self.family == 4:  # no options, no type of service, no fragment; length, identification and TTL vary
            return [0x45, 0, None, None, None, None, 0x40, 0, None, self.protocol, None, None, *source,
                    *destination]
        return [0x60, 0, 0, 0, None, None, self.protocol, None, *source, *destination]
