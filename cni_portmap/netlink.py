"""The few netlink messages that a runtime's call needs: reading nf_tables, and asking for a route.

Reads only what is asked for, where libnftables lists whole tables first (50 ms with 10,000 containers) and would
need the json package to be understood (7 ms); pyroute2 takes 140 ms to import. Writing rules is libnftables' part.

Source: include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h, rtnetlink.h; netlink(7).
Every call raises OSError with the kernel's errno.
"""
from _socket import AF_INET, AF_INET6, AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, inet_pton, socket
from _struct import Struct

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _DUMP_INTERRUPTED = 0x1, 0x4, 0x300, 0x10
_HEADER = Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = Struct("=HH")  # nlattr: length, type
_INT = Struct("=i")

ENOENT, EINTR, ENODEV, EBADMSG = 2, 4, 19, 74


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute (nlattr), padded to four bytes."""
    return _ATTRIBUTE.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds others (NLA_F_NESTED)."""
    return attribute(kind | 0x8000, b"".join(attributes))


def attributes(data: bytes, at: int = 0) -> "Iterator[tuple[int, bytes]]":
    """Type and payload of each attribute in `data` from `at` on."""
    end = len(data)
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            return
        yield kind & 0x3fff, data[at + 4:at + length]
        at += length + 3 & ~3


def _error_of(answer: bytes) -> int:
    """The errno in an error or the end of a list, 0 for none."""
    return -_INT.unpack_from(answer)[0] if len(answer) >= 4 else 0


class Socket:
    """A netlink socket: one question, all of its answers."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        self._sequence = 0

    def stream(self, kind: int, body: bytes, flags: int) -> "Iterator[bytes]":
        """The bodies of the answers to one message, as they come."""
        self._sequence += 1
        self._socket.send(_HEADER.pack(16 + len(body), kind, _REQUEST | flags, self._sequence, 0) + body)
        interrupted = False
        while True:
            for answer, its_kind, its_flags in self._receive(self._sequence):
                interrupted |= bool(its_flags & _DUMP_INTERRUPTED)
                if its_kind in (_ERROR, _DONE):
                    code = _error_of(answer)
                    if code or interrupted:
                        raise OSError(code or EINTR, "netlink")
                    return
                yield answer

    def ask(self, kind: int, body: bytes, flags: int = 0) -> list[bytes]:
        """The bodies of the answers to one message."""
        return [*self.stream(kind, body, flags | _ACK)]

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a kind; asked again where somebody changed them in between."""
        for _ in range(100):
            try:
                return [*self.stream(kind, body, _DUMP)]
            except OSError as error:
                if error.errno != EINTR:
                    raise
        raise OSError(EINTR, "the ruleset never holds still")

    def ask_each(self, kind: int, bodies: "Iterable[bytes]", flags: int = 0) -> list[bytes | None]:
        """One answer for each message, None where there is nothing of that name (ENOENT; for links ENODEV)."""
        answers: list[bytes | None] = []
        waiting = [*bodies]
        while waiting:
            batch, waiting = waiting[:64], waiting[64:]  # their answers fit the socket's buffer
            first = self._sequence + 1
            self._sequence += len(batch)
            self._socket.send(b"".join(_HEADER.pack(16 + len(body), kind, _REQUEST | flags, first + index, 0) + body +
                                       bytes(-len(body) % 4) for index, body in enumerate(batch)))
            received = 0
            while received < len(batch):
                for answer, its_kind, _ in self._receive(first):
                    received += 1
                    if its_kind != _ERROR:
                        answers.append(answer)
                        continue
                    code = _error_of(answer)
                    if code not in (0, ENOENT, ENODEV):
                        raise OSError(code, "netlink")
                    answers.append(None if code else b"")
        return answers

    def _receive(self, first: int) -> "Iterator[tuple[bytes, int, int]]":
        """Body, type and flags of each message in the next datagram that answers question `first` or a later one.

        What still comes for an earlier one, which ended with an error, is passed over.
        """
        data = self._socket.recv(1 << 16)
        at, end = 0, len(data)
        while at + 16 <= end:
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            if length < 16:
                raise OSError(EBADMSG, "netlink")
            if sequence >= first:
                yield data[at + 16:at + length], kind, flags
            at += length + 3 & ~3


# --- nf_tables ------------------------------------------------------------------------------------------------

_NFPROTO_INET = bytes((1, 0, 0, 0))  # nfgenmsg: family, version, resource
_NFPROTO_IPV4 = 2
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = (10 << 8 | message for message in (1, 4, 7, 10, 13))


def _name(kind: int, name: str) -> bytes:
    return attribute(kind, name.encode() + b"\0")


class NfTables:
    """Reads one table of the family `inet`."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._netlink = Socket(NETLINK_NETFILTER)

    def flags(self) -> int | None:
        """The table's flags (1: dormant), None where there is no such table."""
        answer = self._netlink.ask_each(_GETTABLE, [_NFPROTO_INET + _name(1, self._table)])[0]
        if answer is None:
            return None
        return int.from_bytes(dict(attributes(answer, 4)).get(2, b"\0"), "big")

    def chain(self, chain: str) -> dict[int, bytes] | None:
        """A chain's attributes (enum nft_chain_attributes), None where there is no such chain."""
        answer = self._netlink.ask_each(_GETCHAIN, [_NFPROTO_INET + _name(1, self._table) + _name(3, chain)])[0]
        return None if answer is None else dict(attributes(answer, 4))

    def chains(self) -> "Iterator[dict[int, bytes]]":
        """The attributes of each of the table's chains."""
        for answer in self._netlink.dump(_GETCHAIN, _NFPROTO_INET):
            found = dict(attributes(answer, 4))
            if found.get(1) == self._table.encode() + b"\0":
                yield found

    def has_set(self, name: str) -> bool:
        """Whether the table has a set or map of that name."""
        return self._netlink.ask_each(_GETSET, [_NFPROTO_INET + _name(1, self._table) + _name(2, name)])[0] is not None

    def rules(self, chain: str = "") -> "Iterator[tuple[str, str, bytes]]":
        """Chain, comment and expressions (raw) of the rules of `chain`, or of all chains."""
        body = _NFPROTO_INET + _name(1, self._table) + (_name(2, chain) if chain else b"")
        for answer in self._netlink.dump(_GETRULE, body):
            found = dict(attributes(answer, 4))
            yield _text(found.get(2, b"")), _comment(found.get(7, b"")), found.get(4, b"")

    def lookup(self, elements: "Iterable[tuple[str, bytes]]") -> dict[tuple[str, bytes], str]:
        """Which chain each of the map elements (map, key) leads to; those that do not exist are left out."""
        wanted = [*elements]
        bodies = (_NFPROTO_INET + _name(1, self._table) + _name(2, name) +
                  nested(3, nested(1, nested(1, attribute(1, key)))) for name, key in wanted)
        answers = self._netlink.ask_each(_GETSETELEM, bodies)
        return {element: chain for element, answer in zip(wanted, answers, strict=True) if answer is not None
                for _, chain in _verdicts(answer)}

    def elements(self, name: str) -> "Iterator[tuple[bytes, str]]":
        """Key and chain of a verdict map's elements."""
        for answer in self.raw_elements(name):
            yield from _verdicts(answer)

    def raw_elements(self, name: str) -> list[bytes]:
        """The messages that list the elements of a set or map; none where it does not exist."""
        try:
            return self._netlink.dump(_GETSETELEM, _NFPROTO_INET + _name(1, self._table) + _name(2, name))
        except OSError as error:
            if error.errno != ENOENT:
                raise
            return []


def all_rules() -> "Iterator[tuple[str, str, bytes]]":
    """Table, chain and expressions (raw) of the rules of every table that translates IPv4 (families ip and inet)."""
    for answer in Socket(NETLINK_NETFILTER).dump(_GETRULE, bytes(4)):
        if answer[0] in (_NFPROTO_INET[0], _NFPROTO_IPV4):
            found = dict(attributes(answer, 4))
            yield _text(found.get(1, b"")), _text(found.get(2, b"")), found.get(4, b"")


def list_elements(answer: bytes) -> "Iterator[bytes]":
    """The elements in a message of `raw_elements`, each raw (enum nft_set_elem_attributes)."""
    for kind, found in attributes(answer, 4):
        if kind == 3:  # NFTA_SET_ELEM_LIST_ELEMENTS
            for _, element in attributes(found):
                yield element


def _verdicts(answer: bytes) -> "Iterator[tuple[bytes, str]]":
    for element in list_elements(answer):
        found = dict(attributes(element))
        key = dict(attributes(found.get(1, b""))).get(1, b"")
        verdict = dict(attributes(dict(attributes(found.get(2, b""))).get(2, b"")))
        if key:  # a catch-all element has none
            yield key, _text(verdict.get(2, b""))


def _text(name: bytes) -> str:
    """A name as the kernel has it, with a final NUL; others may have given it any bytes."""
    return name[:-1].decode(errors="replace")


def _comment(userdata: bytes) -> str:
    """The comment among a rule's user data (libnftnl's own format: type, length, value)."""
    at = 0
    while at + 2 <= len(userdata):
        kind, length = userdata[at], userdata[at + 1]
        if kind == 0:
            return userdata[at + 2:at + 1 + length].decode(errors="replace")
        at += 2 + length
    return ""


def expressions(raw: bytes) -> "Iterator[tuple[str, dict[int, bytes]]]":
    """Name and attributes of each expression of a rule (enum nft_expr_attributes)."""
    for _, expression in attributes(raw):
        found = dict(attributes(expression))
        yield _text(found.get(1, b"")), dict(attributes(found.get(2, b"")))


class DnatRule:
    """A dnat rule, read from its expressions: the ports that it takes, and where they go.

    `ports`: host port -> container port; `daddr`: the destination address that it asks for, packed, b"" for none;
    `target`: the container's address, packed, b"" where it is no dnat rule. It reads what `ruleset` lets libnftables
    compile, whatever its version: comparisons of the destination port, an anonymous set or map of ports (`elements`
    fetches one by its name), immediate addresses and ports.
    """

    __slots__ = ("daddr", "packets", "ports", "protocol", "target")

    def __init__(self, raw: bytes, elements: "Callable[[bytes], Iterable[tuple[bytes, bytes]]]") -> None:
        self.packets, self.protocol, self.daddr, self.target = 0, 0, b"", b""
        self.ports: dict[int, int] = {}
        loaded: dict[bytes, tuple[int, int]] = {}  # register -> base and offset of the header field that is in it
        values: dict[bytes, bytes] = {}  # register -> what it is set to
        lowest, highest = 0, 65535
        mapped: dict[int, int] = {}
        for name, fields in expressions(raw):
            if name == "payload" and 1 in fields:  # NFTA_PAYLOAD_DREG, _BASE, _OFFSET
                loaded[fields[1]] = _number(fields[2]), _number(fields[3])
            elif name == "meta" and 1 in fields:  # NFTA_META_DREG, _KEY
                loaded[fields[1]] = _META, _number(fields[2])
            elif name == "cmp":  # NFTA_CMP_SREG, _OP, _DATA
                value, where, operator = _value(fields[3]), loaded.get(fields[1]), _number(fields[2])
                if where == _DADDR.get(len(value)) and operator == _EQUAL:
                    self.daddr = self.daddr or value
                elif where == _L4PROTO:
                    self.protocol = value[0]
                elif where == _DPORT:
                    lowest = _number(value) if operator in (_EQUAL, _AT_LEAST) else lowest
                    highest = _number(value) if operator in (_EQUAL, _AT_MOST) else highest
            elif name == "range" and loaded.get(fields[1]) == _DPORT:  # NFTA_RANGE_SREG, _FROM_DATA, _TO_DATA
                lowest, highest = _number(_value(fields[3])), _number(_value(fields[4]))
            elif name == "lookup" and loaded.get(fields[2]) == _DPORT and 3 in fields:  # NFTA_LOOKUP_SET, _SREG, _DREG
                mapped = {_number(key[:2]): _number(data[:2]) for key, data in elements(fields[1])}
            elif name == "immediate":  # NFTA_IMMEDIATE_DREG, _DATA
                values[fields[1]] = _value(fields[2])
            elif name == "counter":  # NFTA_COUNTER_PACKETS
                self.packets = _number(fields[2])
            elif name == "nat":  # NFTA_NAT_REG_ADDR_MIN, _REG_PROTO_MIN
                self.target = values.get(fields.get(3, b""), b"")
                port = _number(values.get(fields.get(5, b""), b"")[:2])
                self.ports = mapped or {host: port or host for host in range(lowest, highest + 1)}


_META, _EQUAL, _AT_MOST, _AT_LEAST = -1, 0, 3, 5  # enum nft_cmp_ops
_L4PROTO = (_META, 16)  # NFT_META_L4PROTO
_DPORT = (2, 2)  # transport header, offset
_DADDR = {4: (1, 16), 16: (1, 24)}  # size: network header, offset


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _value(data: bytes) -> bytes:
    return dict(attributes(data)).get(1, b"")  # NFTA_DATA_VALUE


# --- conntrack ------------------------------------------------------------------------------------------------

_CT_GET, _CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
_ORIGINAL, _REPLY, _ID, _FILTER = 1, 2, 12, 25  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_FILTER
_IP, _PROTO = 1, 2  # CTA_TUPLE_IP, CTA_TUPLE_PROTO
_NUMBER, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3  # CTA_PROTO_NUM, ...
_F_SOURCE, _F_DESTINATION, _F_NUMBER, _F_DESTINATION_PORT = 1, 2, 8, 32  # CTA_FILTER_FLAG(...)
_FAMILIES = {4: AF_INET, 6: AF_INET6}
_TCP, _UDP = 6, 17
EINVAL, EOPNOTSUPP = 22, 95


class Flow:
    """A tracked connection: what its first packet asked for (`destination`, `port`), and who answers (`target`).

    Addresses are packed. `handle`: the attributes that name the flow to the kernel.
    """

    __slots__ = ("family", "destination", "port", "target", "handle")

    def __init__(self, answer: bytes) -> None:
        found = dict(attributes(answer, 4))
        self.destination, _, self.port = _tuple(found[_ORIGINAL])
        _, self.target, _ = _tuple(found[_REPLY])
        self.family = 4 if len(self.destination) == 4 else 6
        self.handle = attribute(_ORIGINAL | 0x8000, found[_ORIGINAL]) + attribute(_ID, found.get(_ID, b""))


def _tuple(raw: bytes) -> tuple[bytes, bytes, int]:
    """Destination, source and destination port of one direction of a flow."""
    found = dict(attributes(raw))
    ips, proto = dict(attributes(found.get(_IP, b""))), dict(attributes(found.get(_PROTO, b"")))
    return ips.get(2) or ips.get(4, b""), ips.get(1) or ips.get(3, b""), \
        int.from_bytes(proto.get(_DESTINATION_PORT, b""), "big")


class Conntrack:
    """The connections of one protocol (a number) that this host tracks. Source: nf_conntrack_netlink.c.

    A message costs the kernel a look at all of them (0.3 us each), so it should be asked seldom. It filters lists
    (CTA_FILTER, since Linux 5.8); an older one hands over everything, so callers look at what they get.
    """

    def __init__(self, protocol: int) -> None:
        self._protocol = protocol
        self._netlink = Socket(NETLINK_NETFILTER)
        self._lists: list[Socket] = []  # open until this object goes: see kernel.leave

    def _body(self, family: int, port: int, destination: bytes = b"", target: bytes = b"") -> bytes:
        """A message about the flows to `port` of `destination` (IPv4) that `target` answers; 0 and b"" for any.

        Not for IPv6 addresses: the kernel's filter takes all but the given one (ctnetlink_filter_match_tuple).
        """
        original = nested(_PROTO, attribute(_NUMBER, bytes((self._protocol,))),
                          attribute(_DESTINATION_PORT, port.to_bytes(2, "big")))
        flags = _F_NUMBER | (_F_DESTINATION_PORT if port else 0)
        if destination:
            original += nested(_IP, attribute(2, destination))  # CTA_IP_V4_DST
            flags |= _F_DESTINATION
        body = nested(_ORIGINAL, original)
        wanted = attribute(1, flags.to_bytes(4, "little"))
        if target:
            body += nested(_REPLY, nested(_IP, attribute(1, target)))  # CTA_IP_V4_SRC
            wanted += attribute(2, _F_SOURCE.to_bytes(4, "little"))
        # Version 1 of nfgenmsg makes a deletion heed the family (ctnetlink_del_conntrack).
        return bytes((_FAMILIES[family], 1, 0, 0)) + body + nested(_FILTER, wanted)

    def flows(self, family: int, port: int) -> "Iterator[Flow]":
        """The flows of a family to `port` of anybody, 0 for any port."""
        self._lists.append(Socket(NETLINK_NETFILTER))  # of its own: the caller may ask for something meanwhile
        for answer in self._lists[-1].stream(_CT_GET, self._body(family, port), _DUMP):
            yield Flow(answer)

    def forget(self, port: int, destination: bytes, target: bytes) -> bool:
        """Let the kernel forget the IPv4 flows that `_body` describes; False where it cannot choose.

        Deletion heeds filters since Linux 6.11 or so (ctnetlink_flush_conntrack), and never the ports of anything but
        TCP and UDP (ctnetlink_filter_match_tuple).
        """
        if self._protocol not in (_TCP, _UDP):
            return False
        try:
            self._netlink.ask(_CT_DELETE, self._body(4, port, destination, target))
        except OSError as error:
            if error.errno in (EINVAL, EOPNOTSUPP):
                return False
            if error.errno != ENOENT:
                raise
        return True

    def forget_each(self, flows: "Iterable[Flow]") -> None:
        """Forget these flows; one that is gone already is no error."""
        bodies = [bytes((_FAMILIES[flow.family], 1, 0, 0)) + flow.handle for flow in flows]
        if not bodies:
            return
        self._netlink.ask_each(_CT_DELETE, bodies, _ACK)


# --- routes, addresses, links ---------------------------------------------------------------------------------

_GETLINK, _GETADDR, _NEWROUTE, _DELROUTE, _GETROUTE = 18, 22, 24, 25, 26
_CREATE, _APPEND = 0x400, 0x800
_RT_TABLE_LOCAL, _RTPROT_STATIC, _RTN_LOCAL = 255, 4, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_VIA = 1, 4, 5, 6, 18
ESRCH, EEXIST = 3, 17


def route_interface(family: int, ip: str) -> int:
    """The index of the interface that `ip` is directly behind; 0 for none, or where a gateway is between.

    So it is never the uplink, where the default route leads all that has no route of its own (any more).
    """
    address = inet_pton(_FAMILIES[family], ip)
    body = bytes((_FAMILIES[family], len(address) * 8)) + bytes(10) + attribute(_RTA_DST, address)  # rtmsg
    route = dict(attributes(Socket(NETLINK_ROUTE).ask(_GETROUTE, body)[0], 12))
    return 0 if _RTA_GATEWAY in route or _RTA_VIA in route else int.from_bytes(route.get(_RTA_OIF, b""), "little")


def _local_route(ip: str, interface: int, metric: int) -> bytes:
    """rtmsg and attributes of: local <ip> dev <interface> table local proto static metric <metric>."""
    address = inet_pton(AF_INET6, ip)
    return bytes((AF_INET6, len(address) * 8, 0, 0, _RT_TABLE_LOCAL, _RTPROT_STATIC, 0, _RTN_LOCAL, 0, 0, 0, 0)) + \
        attribute(_RTA_DST, address) + attribute(_RTA_OIF, interface.to_bytes(4, "little")) + \
        attribute(_RTA_PRIORITY, metric.to_bytes(4, "little"))


def add_local_route(ip: str, interface: int, metric: int) -> None:
    """ip -6 route add local <ip> dev <interface> table local metric <metric>, if it is not there."""
    try:  # beside those of other interfaces
        Socket(NETLINK_ROUTE).ask(_NEWROUTE, _local_route(ip, interface, metric), _CREATE | _APPEND)
    except OSError as error:
        if error.errno != EEXIST:
            raise


def delete_local_route(ip: str, interface: int, metric: int) -> None:
    """Undo `add_local_route`; a route that is gone already is no error."""
    try:
        Socket(NETLINK_ROUTE).ask(_DELROUTE, _local_route(ip, interface, metric))
    except OSError as error:
        if error.errno != ESRCH:
            raise


def local_routes(ip: str, metric: int) -> list[int]:
    """The indexes of the interfaces for which `add_local_route` has added a route."""
    address, found = inet_pton(AF_INET6, ip), []
    for answer in Socket(NETLINK_ROUTE).dump(_GETROUTE, bytes((AF_INET6,)) + bytes(11)):  # rtmsg
        route = dict(attributes(answer, 12))
        if answer[4:8] == bytes((_RT_TABLE_LOCAL, _RTPROT_STATIC, 0, _RTN_LOCAL)) and \
                route.get(_RTA_DST) == address and route.get(_RTA_PRIORITY) == metric.to_bytes(4, "little"):
            found.append(int.from_bytes(route[_RTA_OIF], "little"))
    return found


def local_addresses() -> set[bytes]:
    """The addresses of this host, packed."""
    found = set()
    for answer in Socket(NETLINK_ROUTE).dump(_GETADDR, bytes(8)):  # ifaddrmsg
        address = dict(attributes(answer, 8))
        found.add(address.get(2) or address.get(1, b""))  # IFA_LOCAL, IFA_ADDRESS
    return found


def link_kind(interface: int) -> str:
    """What an interface is: "bridge", "veth", ...; "" where it has no kind."""
    body = bytes(4) + interface.to_bytes(4, "little") + bytes(8)  # ifinfomsg
    return _kind_of(Socket(NETLINK_ROUTE).ask(_GETLINK, body)[0])


def _kind_of(link: bytes) -> str:
    return _text(dict(attributes(dict(attributes(link, 16)).get(18, b""))).get(1, b""))  # IFLA_LINKINFO, IFLA_INFO_KIND


PAIRED = ("veth", "netkit")  # kinds of links that end when one end of them does


def paired_link(names: "Sequence[str]") -> tuple[str, int]:
    """Name and index of the last of these interfaces that is one end of a pair; ("", 0) for none.

    The last: a result names the bridge first.
    """
    netlink = Socket(NETLINK_ROUTE)
    without_counters = attribute(29, b"\x08\0\0\0")  # IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS
    for name in reversed(names):
        body = bytes(16) + _name(3, name) + without_counters  # ifinfomsg, IFLA_IFNAME
        answer = netlink.ask_each(_GETLINK, [body])[0]
        if answer and _kind_of(answer) in PAIRED:
            return name, int.from_bytes(answer[4:8], "little")
    return "", 0
