"""The few netlink messages that a runtime's call needs: reading nf_tables, and asking for a route.

Reads only what is asked for, where libnftables lists whole tables first (50 ms with 10,000 containers) and would
need the json package to be understood (7 ms); pyroute2 takes 140 ms to import. Writing rules is libnftables' part.

Source: include/uapi/linux/netlink.h, netfilter/nfnetlink.h, netfilter/nf_tables.h, rtnetlink.h; netlink(7).
Every call raises OSError with the kernel's errno.
"""
from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, inet_pton, socket
from _struct import Struct

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
_ERROR, _DONE = 2, 3
_REQUEST, _ACK, _DUMP, _DUMP_INTERRUPTED = 0x1, 0x4, 0x300, 0x10
_HEADER = Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = Struct("=HH")  # nlattr: length, type
_INT = Struct("=i")

ENOENT, EINTR = 2, 4


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


class Socket:
    """A netlink socket: one question, all of its answers."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        self._sequence = 0

    def ask(self, kind: int, body: bytes, flags: int = _ACK) -> list[bytes]:
        """The bodies of the answers to one message."""
        self._sequence += 1
        self._socket.send(_HEADER.pack(16 + len(body), kind, _REQUEST | flags, self._sequence, 0) + body)
        answers: list[bytes] = []
        interrupted = False
        while True:
            for answer, kind, its_flags in self._receive():
                interrupted |= bool(its_flags & _DUMP_INTERRUPTED)
                if kind == _ERROR or kind == _DONE:
                    code = _INT.unpack_from(answer)[0] if len(answer) >= 4 else 0
                    if code or interrupted:
                        raise OSError(-code or EINTR, "netlink")
                    return answers
                answers.append(answer)

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The bodies of all objects of a kind; asked again where somebody changed them in between."""
        for _ in range(100):
            try:
                return self.ask(kind, body, _DUMP)
            except OSError as error:
                if error.errno != EINTR:
                    raise
        raise OSError(EINTR, "the ruleset never holds still")

    def ask_each(self, kind: int, bodies: "Iterable[bytes]") -> list[bytes | None]:
        """One answer for each message, None where there is nothing of that name (ENOENT)."""
        answers: list[bytes | None] = []
        waiting = [*bodies]
        while waiting:
            batch, waiting = waiting[:64], waiting[64:]  # their answers fit the socket's buffer
            first = self._sequence + 1
            self._sequence += len(batch)
            self._socket.send(b"".join(_HEADER.pack(16 + len(body), kind, _REQUEST, first + index, 0) + body +
                                       bytes(-len(body) % 4) for index, body in enumerate(batch)))
            received = 0
            while received < len(batch):
                for answer, its_kind, _ in self._receive():
                    received += 1
                    if its_kind != _ERROR:
                        answers.append(answer)
                        continue
                    code = -_INT.unpack_from(answer)[0]
                    if code != ENOENT:
                        raise OSError(code, "netlink")
                    answers.append(None)
        return answers

    def _receive(self) -> "Iterator[tuple[bytes, int, int]]":
        """Body, type and flags of each message in the next datagram that answers the last question."""
        data = self._socket.recv(1 << 16)
        at, end = 0, len(data)
        while at + 16 <= end:
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
            yield data[at + 16:at + length], kind, flags
            at += length + 3 & ~3


# --- nf_tables ------------------------------------------------------------------------------------------------

_NFPROTO_INET = bytes((1, 0, 0, 0))  # nfgenmsg: family, version, resource
_GETTABLE, _GETCHAIN, _GETRULE, _GETSETELEM = (10 << 8 | message for message in (1, 4, 7, 13))


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

    def rules(self, chain: str = "") -> "Iterator[tuple[str, str, bytes]]":
        """Chain, comment and expressions (raw) of the rules of `chain`, or of all chains."""
        body = _NFPROTO_INET + _name(1, self._table) + (_name(2, chain) if chain else b"")
        for answer in self._netlink.dump(_GETRULE, body):
            found = dict(attributes(answer, 4))
            yield found[2][:-1].decode(), _comment(found.get(7, b"")), found.get(4, b"")

    def lookup(self, elements: "Iterable[tuple[str, bytes]]") -> dict[tuple[str, bytes], str]:
        """Which chain each of the map elements (map, key) leads to; those that do not exist are left out."""
        wanted = [*elements]
        bodies = (_NFPROTO_INET + _name(1, self._table) + _name(2, name) + nested(3, nested(1, nested(1, attribute(1, key))))
                  for name, key in wanted)
        return {element: chain for element, answer in zip(wanted, self._netlink.ask_each(_GETSETELEM, bodies))
                if answer is not None for _, chain in _verdicts(answer)}

    def elements(self, name: str, containing: bytes = b"") -> "Iterator[tuple[bytes, str]]":
        """Key and chain of a verdict map's elements, at least of those whose message has the bytes `containing`."""
        for answer in self.raw_elements(name):
            if containing in answer:
                yield from _verdicts(answer)

    def raw_elements(self, name: str) -> list[bytes]:
        """The messages that list the elements of a set or map; none where it does not exist."""
        try:
            return self._netlink.dump(_GETSETELEM, _NFPROTO_INET + _name(1, self._table) + _name(2, name))
        except OSError as error:
            if error.errno != ENOENT:
                raise
            return []


def list_elements(answer: bytes) -> "Iterator[bytes]":
    """The elements in a message of `raw_elements`, each raw (enum nft_set_elem_attributes)."""
    for kind, found in attributes(answer, 4):
        if kind == 3:  # NFTA_SET_ELEM_LIST_ELEMENTS
            for _, element in attributes(found):
                yield element


def _verdicts(answer: bytes) -> "Iterator[tuple[bytes, str]]":
    for element in list_elements(answer):
        found = dict(attributes(element))
        key = dict(attributes(found[1]))[1]
        verdict = dict(attributes(dict(attributes(found.get(2, b""))).get(2, b"")))
        yield key, verdict.get(2, b"\0")[:-1].decode()


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
        yield found[1][:-1].decode(), dict(attributes(found.get(2, b"")))


# --- routes ---------------------------------------------------------------------------------------------------

_GETROUTE = 26


def route_interface(kind: int, ip: str) -> int:
    """The index of the interface that this host would send packets for `ip` to (RTM_GETROUTE); 0 for none.

    `kind`: AF_INET or AF_INET6.
    """
    address = inet_pton(kind, ip)
    body = bytes((kind, len(address) * 8)) + bytes(10) + attribute(1, address)
    answer = Socket(NETLINK_ROUTE).ask(_GETROUTE, body)[0]
    return int.from_bytes(dict(attributes(answer, 12)).get(4, b""), "little")
