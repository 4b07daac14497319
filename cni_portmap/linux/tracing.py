"""Live packets, as nf_tables tells of them: a table that marks some, and the events of their way.

The table has the flag `owner`: the kernel removes it when this process ends, however that ends, and lets nobody else
change it; `nft flush ruleset` leaves it. That needs Linux 5.12.

The mark of a packet (nftrace) holds in all hooks of this network namespace. At both ends of each hook there is an empty
chain: between them something lost a packet that nf_tables has not told of, such as iptables-legacy; after the last one
it was routing. Source: include/uapi/linux/netfilter/nf_tables.h (enum nft_trace_attributes), nf_tables_trace.c.
"""
import contextlib
import os
from collections.abc import Iterator
from select import select
from socket import AF_NETLINK, SO_RCVBUF, SOCK_CLOEXEC, SOCK_RAW, SOL_SOCKET, socket
from struct import unpack_from
from time import monotonic
from typing import NamedTuple, Self

from ..cni import NFT_REFUSED, CniError
from .libnftables import Libnftables
from .netlink import NETLINK_NETFILTER, attributes, text
from .rulesets import FAMILIES

NFNLGRP_NFTRACE, NFT_MSG_TRACE = 9, 10 << 8 | 17
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, SO_RCVBUFFORCE = 270, 1, 33
(TABLE, CHAIN, RULE_HANDLE, TYPE, VERDICT, ID, LL_HEADER, NETWORK_HEADER, TRANSPORT_HEADER, IIF, IIFTYPE, OIF, OIFTYPE,
 MARK, NFPROTO, POLICY, _, CT_ID, CT_DIRECTION, CT_STATUS, CT_STATE) = range(1, 22)
HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
FIRST, LAST = -450, 2147483647  # before raw, of iptables-legacy too; after all
BEGIN, END = "begin_", "end_"


class Event(NamedTuple):
    """Something that happened to a packet. `id`: the packet's; `table`: its family and name.

    `verdict`: its code, None where there is none; `handle`: of the rule, 0 for none. `network`, `transport`: headers,
    b"" after the first event of a base chain; `iif`, `oif`: indexes. `state`: NF_CT_STATE_* bits, 0 if it is not told.
    """

    id: int
    family: str
    table: str
    chain: str
    handle: int
    is_policy: bool
    verdict: int | None
    network: bytes
    transport: bytes
    iif: int
    oif: int
    state: int

    @property
    def protocol(self) -> int:
        """Of the transport header."""
        return self.network[9] if self.network[0] >> 4 == 4 else self.network[6]

    @property
    def ends(self) -> tuple[bytes, int, bytes, int]:
        """Source, its port, destination, its port."""
        source, destination = (self.network[12:16], self.network[16:20]) if self.network[0] >> 4 == 4 else \
            (self.network[8:24], self.network[24:40])
        sport, dport = unpack_from("!HH", self.transport)
        return source, sport, destination, dport

    @property
    def flags(self) -> int:
        """Of TCP; 0 for other protocols."""
        return self.transport[13] if self.protocol == 6 and len(self.transport) > 13 else 0


class Tracing:
    """The table and the socket. A context manager. `marks`: matches, by hook, of the packets to tell of."""

    def __init__(self, marks: "dict[str, list[str]]") -> None:
        self.name = f"cni_portmap_trace_{os.getpid()}"
        self._marks = marks

    def __enter__(self) -> Self:
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, 1 << 22)
        with contextlib.suppress(OSError):
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUF, 1 << 20)
        self._socket.bind((0, 0))  # without an address of its own it would hear nothing
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)
        self._nft = Libnftables()
        problem = self._nft.run(self._text())
        if problem:
            self._socket.close()
            raise CniError(NFT_REFUSED, f"cannot trace: {problem}",
                           "flags owner needs Linux 5.12 and nft 0.9.9; without it the table could be left behind")
        return self

    def __exit__(self, *_: object) -> None:
        del self._nft  # the kernel deletes what a socket owns with it
        self._socket.close()

    def _text(self) -> str:
        lines = [f"add table inet {self.name} {{ flags owner; }}"]
        for hook in HOOKS:
            for prefix, priority in (BEGIN, FIRST), (END, LAST):
                lines.append(f"add chain inet {self.name} {prefix}{hook} {{ type filter hook {hook} "
                             f"priority {priority}; policy accept; }}")
        lines += [f"add rule inet {self.name} {BEGIN}{hook} {match} limit rate 10/second burst 10 packets meta "
                  "nftrace set 1"
                  for hook, matches in self._marks.items() for match in matches]
        return "\n".join(lines) + "\n"

    def is_own(self, event: Event) -> bool:
        """Whether an event is of the table itself."""
        return event.table == self.name

    def events(self, until: float) -> Iterator[Event | None]:
        """The events as they come, until a time (monotonic); None twenty times a second."""
        while (left := until - monotonic()) > 0:
            if select([self._socket], [], [], min(left, 0.05))[0]:
                with contextlib.suppress(BlockingIOError, OSError):  # ENOBUFS: some were lost
                    yield from _events(self._socket.recv(1 << 16))
            yield None


def _events(data: bytes) -> Iterator[Event]:
    at = 0
    while at + 20 <= len(data):
        length, kind = unpack_from("=IH", data, at)
        if length < 20:
            return
        if kind == NFT_MSG_TRACE:
            yield _event(data[at + 16:at + length])
        at += length + 3 & ~3


def _event(body: bytes) -> Event:
    found = dict(attributes(body, 4))
    verdict = dict(attributes(found.get(VERDICT, b""))).get(1)
    policy = found.get(POLICY)
    code = int.from_bytes(verdict, "big", signed=True) if verdict else \
        int.from_bytes(policy, "big", signed=True) if policy else None
    return Event(_number(found, ID), FAMILIES.get(body[0], str(body[0])), text(found.get(TABLE, b"\0")),
                 text(found.get(CHAIN, b"\0")), _number(found, RULE_HANDLE), _number(found, TYPE) == 1, code,
                 found.get(NETWORK_HEADER, b""), found.get(TRANSPORT_HEADER, b""), _number(found, IIF),
                 _number(found, OIF), _number(found, CT_STATE))


def _number(found: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), "big")
