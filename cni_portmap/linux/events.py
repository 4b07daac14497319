"""What nf_tables tells of each transaction, and our table in the same words: for the agent.

The kernel sends each transaction of this network namespace as its messages (NFT_MSG_NEWRULE, NFT_MSG_DELSETELEM, ...),
and then NFT_MSG_NEWGEN with its number and the process that made it.

Source: include/uapi/linux/netfilter/nf_tables.h; kernel functions nf_tables_commit, nf_tables_gen_notify.
"""
from _socket import (AF_NETLINK, MSG_DONTWAIT, SO_RCVBUF, SOCK_CLOEXEC, SOCK_RAW, SOL_SOCKET, socket)
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import EINTR
from .batch import END, begin
from .netlink import (_HEADER, NETLINK_NETFILTER, NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLMSG_ERROR, Socket, attribute,
                      attributes, error_of, named, text)
from .table import (NFGENMSG, NFT_MSG_GETCHAIN, NFT_MSG_GETGEN, NFT_MSG_GETRULE, NFT_MSG_GETSET, NFT_MSG_GETTABLE,
                    NFTA_GEN_ID, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_NAME, NFTA_SET_TABLE,
                    dump_elements)

NFNLGRP_NFTABLES = 7
SO_RCVBUFFORCE = 33
NFT_MSG_NEWGEN = 10 << 8 | 15  # NFNL_SUBSYS_NFTABLES
NFTA_GEN_PROC_PID, NFTA_GEN_PROC_NAME = 2, 3
BUFFER = 64 << 20  # bytes; 10,000 containers that are flushed are 20 MB. It costs nothing until it is used
NFT_MSG_NEWTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM = (
    10 << 8 | message for message in (0, 3, 6, 9, 12))

Message = tuple[int, int, bytes]  # type, flags, and body: nfgenmsg and attributes


class Commit(NamedTuple):
    """A transaction. `messages`: those of each table that was asked for; `elsewhere`: whether it had others, too.

    `generation`: the number that it gave the ruleset; `pid`, `name`: the process that made it, of the first PID
    namespace; `port`: of the socket that it came by.
    """

    generation: int
    pid: int
    name: str
    port: int
    messages: dict[str, list[Message]]
    elsewhere: bool


class Overrun(Exception):
    """The kernel had more to tell than the buffer holds; what was lost is not known."""


class Listener:
    """Hears each transaction of this network namespace from now on. `tables`: of family inet, whose messages count.

    `buffer`: bytes. Raises OSError.
    """

    def __init__(self, tables: Sequence[str], buffer: int = BUFFER) -> None:
        self._tables = {attribute(1, name.encode() + b"\0"): name for name in tables}  # NFTA_*_TABLE is 1 everywhere
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        try:
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, buffer)
        except OSError:  # in a user namespace: up to net.core.rmem_max
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUF, buffer)
        self._socket.bind((0, 1 << NFNLGRP_NFTABLES - 1))
        self._begin()

    def _begin(self) -> None:
        self._messages: dict[str, list[Message]] = {}
        self._elsewhere = False

    def fileno(self) -> int:
        """The descriptor, readable where there is something to hear."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def commits(self) -> Iterator[Commit]:
        """The transactions that ended since the last call. Never waits. Raises Overrun, and goes on after it."""
        while True:
            try:
                data = self._socket.recv(1 << 16, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == EINTR:
                    continue
                self._begin()
                raise Overrun from None
            yield from self._read(data)

    def _read(self, data: bytes) -> Iterator[Commit]:
        at, end = 0, len(data)
        while at + 20 <= end:
            length, kind, flags, _, port = _HEADER.unpack_from(data, at)
            if length < 20:
                return
            if kind == NFT_MSG_NEWGEN:
                found = dict(attributes(data[at + 20:at + length]))
                yield Commit(int.from_bytes(found.get(NFTA_GEN_ID, b""), "big"),
                             int.from_bytes(found.get(NFTA_GEN_PROC_PID, b""), "big"),
                             text(found.get(NFTA_GEN_PROC_NAME, b"\0")), port, self._messages, self._elsewhere)
                self._begin()
            elif data[at + 16] == NFGENMSG[0] and (name := self._tables.get(self._first(data, at + 20))):
                self._messages.setdefault(name, []).append((kind, flags, data[at + 16:at + length]))
            else:
                self._elsewhere = True
            at += length + 3 & ~3

    @staticmethod
    def _first(data: bytes, at: int) -> bytes:
        """The first attribute of a message, as it is."""
        return data[at:at + (int.from_bytes(data[at:at + 2], "little") + 3 & ~3)]


def generation(netlink: Socket) -> int:
    """The number of the ruleset's last transaction."""
    return int.from_bytes(dict(attributes(netlink.ask(NFT_MSG_GETGEN, bytes(4))[0], 4)).get(NFTA_GEN_ID, b""), "big")


def read_table(netlink: Socket, name: str) -> list[Message]:
    """A table of family inet, as the messages of one transaction that would make it; [] where there is none.

    Sets come before the rules that use them, as in a transaction of libnftables. Raises OSError.
    """
    its_table = named(1, name)
    there = netlink.ask_each(NFT_MSG_GETTABLE, [NFGENMSG + its_table])[0]
    if there is None:
        return []
    messages: list[Message] = [(NFT_MSG_NEWTABLE, 0, there)]
    for body in netlink.dump(NFT_MSG_GETSET, NFGENMSG + named(NFTA_SET_TABLE, name)):
        messages.append((NFT_MSG_NEWSET, NLM_F_CREATE, body))
        its_set = dict(attributes(body, 4))[NFTA_SET_NAME]
        asked = NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, name) + attribute(NFTA_SET_ELEM_LIST_SET, its_set)
        messages += ((NFT_MSG_NEWSETELEM, NLM_F_CREATE, found) for found in dump_elements(netlink, asked))
    for get, told in (NFT_MSG_GETCHAIN, NFT_MSG_NEWCHAIN), (NFT_MSG_GETRULE, NFT_MSG_NEWRULE):
        messages += ((told, NLM_F_CREATE | NLM_F_APPEND, body) for body in netlink.dump(get, NFGENMSG + its_table)
                     if body.startswith(its_table, 4) and body[0] == NFGENMSG[0])
    return messages


def commit(netlink: Socket, generation: int, messages: Sequence[Message]) -> dict[int, int]:
    """Make a transaction of messages; the errno of each that the kernel refuses, by its place: {} if all is written.

    Nothing is written otherwise. Place -1 is the transaction itself: with ERESTART, the ruleset is not that of
    `generation` any more. Raises OSError where it could not even be sent.
    """
    last = len(messages)
    first = netlink.send([begin(generation)[:3],
                          *((kind, flags | NLM_F_ACK if index == last else flags, body)
                            for index, (kind, flags, body) in enumerate(messages, 1)), END[:3]])
    refused: dict[int, int] = {}
    while True:
        for answer, kind, _, sequence in netlink.receive(first):
            if kind != NLMSG_ERROR:
                continue
            place, code = sequence - first - 1, error_of(answer)
            if code:
                refused[place] = code
            if place in (-1, last - 1):
                return refused
