"""A transaction that removes, by netlink: DEL and GC need no libnftables.

For a deletion libnftables lists every set of the host: with somebody's large one that takes seconds
(nftables-geoip#8), and one that another version has written may end the process (kubernetes#136786). What is added is
nft text, but the little that a removal leaves to those that stand by.

Source: include/uapi/linux/netfilter/nfnetlink.h, nf_tables.h; kernel function nfnetlink_rcv_batch.
"""
from .. import ruleset
from .netlink import NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLMSG_ERROR, Socket, attribute, error_of, named, nested
from .table import (NFGENMSG, NFTA_CHAIN_NAME, NFTA_CHAIN_TABLE, NFTA_DATA_VALUE, NFTA_DATA_VERDICT, NFTA_LIST_ELEM,
                    NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_RULE_USERDATA, NFTA_SET_ELEM_DATA,
                    NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_LIST_ELEMENTS, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_TABLE,
                    NFTA_VERDICT_CHAIN, NFTNL_UDATA_COMMENT)

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ..ruleset import Element

    Command = tuple[int, int, bytes, str]  # type, flags and body of a message, and what it does, for errors

NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 16, 17, 1
NFT_MSG_DELCHAIN, NFT_MSG_NEWRULE, NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM = (
    10 << 8 | message for message in (5, 6, 12, 14))  # NFNL_SUBSYS_NFTABLES
_BATCH = bytes((0, 0, 0, 10))  # nfgenmsg: no family, and the subsystem as resource
NLM_F_EXCL = 0x200
NFTA_VERDICT_CODE, NFT_GOTO, NFT_CONTINUE = 1, -4, -1
NFTA_EXPR_NAME, NFTA_EXPR_DATA, NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2, 1, 2
NFT_REG_VERDICT = 0
AT_ONCE = 1000  # elements of a message: its list ends at 64 KiB


def removal(generation: int, chains: "Iterable[str]", elements: "Iterable[Element]",
            inherited: "Mapping[Element, str]", notes: "Iterable[tuple[str, str]]",
            interfaces: "Iterable[str]") -> "list[Command]":
    """The messages of a transaction, see `Kernel.remove`. An element goes before the chain that it leads to."""
    opened = [(ruleset.LOCALHOST_INTERFACES, ruleset.key_of_interface(name)) for name in interfaces]
    commands = [(NFNL_MSG_BATCH_BEGIN, 0, _BATCH + attribute(NFNL_BATCH_GENID, generation.to_bytes(4, "big")), "begin"),
                *_elements(NFT_MSG_DELSETELEM, 0, [*elements, *opened], "delete element"),
                *(_delete_chain(chain) for chain in chains)]
    for heir in dict.fromkeys(inherited.values()):
        its = [element for element, chain in inherited.items() if chain == heir]
        commands += _elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE | NLM_F_EXCL, its, "create element",
                              nested(NFTA_SET_ELEM_DATA, _verdict(NFT_GOTO, named(NFTA_VERDICT_CHAIN, heir))))
    return [*commands, *(_note(*note) for note in notes), (NFNL_MSG_BATCH_END, 0, _BATCH, "commit")]


def _delete_chain(chain: str) -> "Command":
    """Its rules go with it."""
    body = NFGENMSG + named(NFTA_CHAIN_TABLE, ruleset.TABLE_NAME) + named(NFTA_CHAIN_NAME, chain)
    return NFT_MSG_DELCHAIN, 0, body, f"delete chain {ruleset.TABLE} {chain}"


def _elements(kind: int, flags: int, elements: "Sequence[Element]", command: str, data: bytes = b"") \
        -> "Iterator[Command]":
    """Messages for elements of sets and maps, all with the same `data`."""
    keys: dict[str, list[bytes]] = {}
    for name, key in elements:
        keys.setdefault(name, []).append(key)
    for name, its in keys.items():
        head = NFGENMSG + named(NFTA_SET_ELEM_LIST_TABLE, ruleset.TABLE_NAME) + named(NFTA_SET_ELEM_LIST_SET, name)
        for at in range(0, len(its), AT_ONCE):
            found = (nested(NFTA_LIST_ELEM, nested(NFTA_SET_ELEM_KEY, attribute(NFTA_DATA_VALUE, key)), data)
                     for key in its[at:at + AT_ONCE])
            yield kind, flags, head + nested(NFTA_SET_ELEM_LIST_ELEMENTS, *found), f"{command} {ruleset.TABLE} {name}"


def _verdict(code: int, chain: bytes = b"") -> bytes:
    return nested(NFTA_DATA_VERDICT, attribute(NFTA_VERDICT_CODE, code.to_bytes(4, "big", signed=True)), chain)


def _note(chain: str, ifname: str) -> "Command":
    """The rule of `ruleset.standby_note`."""
    comment = ruleset.standby_comment(ifname).encode() + b"\0"
    going_on = nested(NFTA_EXPR_DATA, attribute(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT.to_bytes(4, "big")),
                      nested(NFTA_IMMEDIATE_DATA, _verdict(NFT_CONTINUE)))
    body = NFGENMSG + named(NFTA_RULE_TABLE, ruleset.TABLE_NAME) + named(NFTA_RULE_CHAIN, chain) + \
        nested(NFTA_RULE_EXPRESSIONS, nested(NFTA_LIST_ELEM, named(NFTA_EXPR_NAME, "immediate"), going_on)) + \
        attribute(NFTA_RULE_USERDATA, bytes((NFTNL_UDATA_COMMENT, len(comment))) + comment)
    return NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, body, f"add rule {ruleset.TABLE} {chain}"


def send(netlink: Socket, commands: "Sequence[Command]") -> tuple[int, str]:
    """Send a transaction; errno and command of what the kernel refuses of it first, (0, "") where all is committed.

    The last command before the end asks for an acknowledgement: the end itself is only acknowledged since Linux 6.10.
    The kernel tells errors in their order, after it has committed or forgotten all.
    """
    last = len(commands) - 2
    first = netlink.send([(kind, flags | (NLM_F_ACK if index == last else 0), body)
                          for index, (kind, flags, body, _) in enumerate(commands)])
    while True:
        for answer, kind, _, sequence in netlink.receive(first):
            code = error_of(answer)
            if kind == NLMSG_ERROR and (code or sequence == first + last):
                return code, commands[sequence - first][3] if code else ""
