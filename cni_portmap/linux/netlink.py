"""Netlink: a socket, its messages and their attributes; routes, addresses and links.

The hot path reads through it only what is asked for, where libnftables lists whole tables first (50 ms with 10,000
containers) and would need the json package to be understood (7 ms); pyroute2 takes 140 ms to import.

Source: include/uapi/linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h; netlink(7), rtnetlink(7). Every call raises
OSError with the kernel's errno.
"""
from _socket import (AF_INET6, AF_NETLINK, SO_SNDBUF, SOCK_CLOEXEC, SOCK_RAW, SOL_SOCKET, if_indextoname, inet_ntop,
                     inet_pton, socket)
from _struct import Struct

from ..attachment import AF
from . import EBADMSG, EEXIST, EINTR, ENODEV, ENOENT, ESRCH

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x4, 0x10, 0x300
NLM_F_CREATE, NLM_F_APPEND = 0x400, 0x800
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3fff
SO_SNDBUFFORCE = 32
SEND_BUFFER = 1 << 17  # bytes that any socket sends at once: less than net.core.wmem_default
_HEADER = Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = Struct("=HH")  # nlattr: length, type
_INT = Struct("=i")


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute (nlattr), padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others (NLA_F_NESTED)."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes, at: int = 0) -> "Iterator[tuple[int, bytes]]":
    """Type and payload of each attribute in `data` from `at` on."""
    end = len(data)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & NLA_TYPE_MASK, data[at + 4:at + length]
        at += length + 3 & ~3


def named(kind: int, name: str) -> bytes:
    """An attribute that holds a name, as the kernel has it: with a final NUL."""
    return attribute(kind, name.encode() + b"\0")


def text(name: bytes) -> str:
    """A name as the kernel has it, with a final NUL; others may have given it any bytes."""
    return name[:-1].decode(errors="replace")


def error_of(answer: bytes) -> int:
    """The errno in an error or the end of a list, 0 for none."""
    return -_INT.unpack_from(answer)[0] if len(answer) >= 4 else 0


class Socket:
    """A netlink socket: one question, all of its answers."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        self._sequence = 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def port(self) -> int:
        """The number by which the kernel knows this socket."""
        self._socket.bind((0, 0))
        return int(self._socket.getsockname()[0])

    def be_strict(self) -> None:
        """Let the kernel filter lists by what a question says (NETLINK_GET_STRICT_CHK, since Linux 4.20)."""
        self._socket.setsockopt(270, 12, 1)  # SOL_NETLINK

    def close(self) -> None:
        """Close it. One of NETLINK_NETFILTER waits for this process' own deletions (11 ms), see `Kernel.leave`."""
        self._socket.close()

    def send(self, messages: "Sequence[tuple[int, int, bytes]]") -> int:
        """Send messages (type, flags, body) at once; the sequence number of the first, which the others follow."""
        first = self._sequence + 1
        self._sequence += len(messages)
        data = b"".join(_HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, first + index, 0) + body +
                        bytes(-len(body) % 4) for index, (kind, flags, body) in enumerate(messages))
        if len(data) > SEND_BUFFER:
            try:
                self._socket.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, len(data))
            except OSError:  # in a user namespace: up to net.core.wmem_max
                self._socket.setsockopt(SOL_SOCKET, SO_SNDBUF, len(data))
        self._socket.send(data)
        return first

    def stream(self, kind: int, body: bytes, flags: int) -> "Iterator[bytes]":
        """The bodies of the answers to one message, as they come."""
        sequence = self.send([(kind, flags, body)])
        interrupted = False
        while True:
            for answer, its_kind, its_flags, _ in self.receive(sequence):
                interrupted |= bool(its_flags & NLM_F_DUMP_INTR)
                if its_kind in (NLMSG_ERROR, NLMSG_DONE):
                    code = error_of(answer)
                    if code or interrupted:
                        raise OSError(code or EINTR, "netlink")
                    return
                yield answer

    def ask(self, kind: int, body: bytes, flags: int = 0) -> list[bytes]:
        """The bodies of the answers to one message."""
        return [*self.stream(kind, body, flags | NLM_F_ACK)]

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a kind; asked again where somebody changed them in between."""
        for _ in range(100):
            try:
                return [*self.stream(kind, body, NLM_F_DUMP)]
            except OSError as error:
                if error.errno != EINTR:
                    raise
        raise OSError(EINTR, "the ruleset kept changing during the dump")

    def ask_each(self, kind: int, bodies: "Iterable[bytes]", flags: int = 0) -> list[bytes | None]:
        """One answer for each message, None if there is nothing of that name (ENOENT; for links ENODEV)."""
        answers: list[bytes | None] = []
        waiting = [*bodies]
        while waiting:
            batch, waiting = waiting[:64], waiting[64:]  # their answers fit the socket's buffer
            first = self.send([(kind, flags, body) for body in batch])
            received = 0
            while received < len(batch):
                for answer, its_kind, _, _ in self.receive(first):
                    received += 1
                    if its_kind != NLMSG_ERROR:
                        answers.append(answer)
                        continue
                    code = error_of(answer)
                    if code not in (0, ENOENT, ENODEV):
                        raise OSError(code, "netlink")
                    answers.append(None if code else b"")
        return answers

    def receive(self, first: int) -> "Iterator[tuple[bytes, int, int, int]]":
        """Body, type, flags and sequence number of each message in the next datagram that answers `first` or a later.

        What still comes for an earlier one, which ended with an error, is passed over.
        """
        data = self._socket.recv(1 << 16)
        at, end = 0, len(data)
        while at + 16 <= end:
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < 16:
                raise OSError(EBADMSG, "netlink")
            if sequence >= first:
                yield data[at + 16:at + length], kind, flags, sequence
            at += length + 3 & ~3


# --- routes, addresses, links ---------------------------------------------------------------------------------

RTM_GETLINK, RTM_GETADDR, RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 18, 22, 24, 25, 26
RT_TABLE_LOCAL, RTPROT_STATIC, RTN_LOCAL = 255, 4, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_VIA = 1, 4, 5, 6, 18
IFLA_IFNAME, IFLA_LINKINFO, IFLA_EXT_MASK, IFLA_INFO_KIND = 3, 18, 29, 1
RTEXT_FILTER_SKIP_STATS = 8
IFA_ADDRESS, IFA_LOCAL = 1, 2
IFLA_ADDRESS, IFLA_MASTER = 1, 10
PAIRED = ("veth", "netkit")  # kinds of links that end when one end of them does


def route_interface(family: int, ip: str) -> int:
    """The index of the interface that `ip` is directly behind; 0 for none, or where a gateway is between.

    So it is never the uplink, where the default route leads all that has no route of its own (any more).
    """
    address = inet_pton(AF[family], ip)
    body = bytes((AF[family], len(address) * 8)) + bytes(10) + attribute(RTA_DST, address)  # rtmsg
    route = dict(attributes(Socket(NETLINK_ROUTE).ask(RTM_GETROUTE, body)[0], 12))
    return 0 if RTA_GATEWAY in route or RTA_VIA in route else int.from_bytes(route.get(RTA_OIF, b""), "little")


def uplink(family: int) -> int:
    """The index of the interface that leads to the rest of the world, 0 for none: by the route to an example of it."""
    address = inet_pton(AF[family], "203.0.113.1" if family == 4 else "2001:db8:ffff::1")  # RFC 5737, RFC 3849
    body = bytes((AF[family], len(address) * 8)) + bytes(10) + attribute(RTA_DST, address)  # rtmsg
    try:
        route = dict(attributes(Socket(NETLINK_ROUTE).ask(RTM_GETROUTE, body)[0], 12))
    except OSError:
        return 0
    return int.from_bytes(route.get(RTA_OIF, b""), "little")


def interface_to(family: int, ip: str) -> str:
    """The name of the interface that a container's address is directly behind; "" for none."""
    try:
        return name_of(route_interface(family, ip))
    except OSError:
        return ""


def name_of(index: int) -> str:
    """The name of the interface with an index; "" for none."""
    try:
        return if_indextoname(index)
    except OSError:
        return ""


def prefixes_of(family: int, interface: int) -> list[str]:
    """The networks of an interface's own addresses, but link-local ones and those of one address."""
    netlink = Socket(NETLINK_ROUTE)
    netlink.be_strict()
    found = []
    body = bytes((AF[family], 0, 0, 0)) + interface.to_bytes(4, "little")  # ifaddrmsg
    for answer in netlink.dump(RTM_GETADDR, body):
        length, address = answer[1], dict(attributes(answer, 8)).get(IFA_ADDRESS, b"")
        bits = len(address) * 8
        if answer[4:8] == body[4:8] and length < bits and address[:2] != b"\xfe\x80" and address:
            number = int.from_bytes(address, "big") >> bits - length << bits - length
            found.append(f"{inet_ntop(AF[family], number.to_bytes(len(address), 'big'))}/{length}")
    return found


def master_of(name: str) -> int:
    """The index of the bridge that an interface is a port of; 0 for none."""
    answer = Socket(NETLINK_ROUTE).ask_each(RTM_GETLINK, [bytes(16) + named(IFLA_IFNAME, name)])[0]
    return int.from_bytes(dict(attributes(answer or b"", 16)).get(IFLA_MASTER, b""), "little")


def _local_route(ip: str, interface: int, metric: int) -> bytes:
    """rtmsg and attributes of: local <ip> dev <interface> table local proto static metric <metric>."""
    address = inet_pton(AF_INET6, ip)
    return bytes((AF_INET6, len(address) * 8, 0, 0, RT_TABLE_LOCAL, RTPROT_STATIC, 0, RTN_LOCAL, 0, 0, 0, 0)) + \
        attribute(RTA_DST, address) + attribute(RTA_OIF, interface.to_bytes(4, "little")) + \
        attribute(RTA_PRIORITY, metric.to_bytes(4, "little"))


def add_local_route(ip: str, interface: int, metric: int) -> None:
    """ip -6 route add local <ip> dev <interface> table local metric <metric>, if it is not there."""
    try:  # beside those of other interfaces
        Socket(NETLINK_ROUTE).ask(RTM_NEWROUTE, _local_route(ip, interface, metric), NLM_F_CREATE | NLM_F_APPEND)
    except OSError as error:
        if error.errno != EEXIST:
            raise


def delete_local_route(ip: str, interface: int, metric: int) -> None:
    """Undo `add_local_route`; a route that is gone already, or its interface, is no error."""
    try:
        Socket(NETLINK_ROUTE).ask(RTM_DELROUTE, _local_route(ip, interface, metric))
    except OSError as error:
        if error.errno not in (ESRCH, ENODEV):
            raise


def local_routes(ip: str, metric: int) -> list[int]:
    """The indexes of the interfaces for which `add_local_route` has added a route."""
    address, found = inet_pton(AF_INET6, ip), []
    for answer in Socket(NETLINK_ROUTE).dump(RTM_GETROUTE, bytes((AF_INET6,)) + bytes(11)):  # rtmsg
        route = dict(attributes(answer, 12))
        if answer[4:8] == bytes((RT_TABLE_LOCAL, RTPROT_STATIC, 0, RTN_LOCAL)) and \
                route.get(RTA_DST) == address and route.get(RTA_PRIORITY) == metric.to_bytes(4, "little"):
            found.append(int.from_bytes(route[RTA_OIF], "little"))
    return found


def local_addresses() -> set[bytes]:
    """The addresses of this host, packed."""
    found = set()
    for answer in Socket(NETLINK_ROUTE).dump(RTM_GETADDR, bytes(8)):  # ifaddrmsg
        address = dict(attributes(answer, 8))
        found.add(address.get(IFA_LOCAL) or address.get(IFA_ADDRESS, b""))
    return found


def link_kind(interface: int) -> str:
    """The kind of an interface: "bridge", "veth", ...; "" if it has none."""
    body = bytes(4) + interface.to_bytes(4, "little") + bytes(8)  # ifinfomsg
    return _kind_of(Socket(NETLINK_ROUTE).ask(RTM_GETLINK, body)[0])


def _kind_of(link: bytes) -> str:
    return text(dict(attributes(dict(attributes(link, 16)).get(IFLA_LINKINFO, b""))).get(IFLA_INFO_KIND, b""))


def paired_link(names: "Sequence[str]") -> tuple[str, int]:
    """Name and index of the last of these interfaces that is one end of a pair; ("", 0) for none.

    The last: a result names the bridge first.
    """
    netlink = Socket(NETLINK_ROUTE)
    without_counters = attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, "little"))
    for name in reversed(names):
        body = bytes(16) + named(IFLA_IFNAME, name) + without_counters  # ifinfomsg
        answer = netlink.ask_each(RTM_GETLINK, [body])[0]
        if answer and _kind_of(answer) in PAIRED:
            return name, int.from_bytes(answer[4:8], "little")
    return "", 0


def link_of(index: int) -> tuple[str, bytes] | None:
    """Name and hardware address of the link with an index, None if there is no such link."""
    body = bytes(4) + index.to_bytes(4, "little") + bytes(8) + \
        attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, "little"))  # ifinfomsg
    answer = Socket(NETLINK_ROUTE).ask_each(RTM_GETLINK, [body])[0]
    if answer is None:
        return None
    found = dict(attributes(answer, 16))
    return text(found.get(IFLA_IFNAME, b"")), found.get(IFLA_ADDRESS, b"")
