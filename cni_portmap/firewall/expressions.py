"""A rule, expression by expression: whether it matches a packet, and what it does then.

An expression that this module does not know makes a MAYBE. Registers are bytes, known or not, so a mask over an unknown
byte may be known all the same.

Source: include/uapi/linux/netfilter/nf_tables.h; kernel: net/netfilter/nft_*.c (what each writes, and when it breaks).
"""
from collections.abc import Callable
from typing import NamedTuple

from ..linux.expressions import NFT_REG_VERDICT
from ..linux.host import Link
from ..linux.netlink import attributes
from ..linux.rulesets import (NF_ACCEPT, NF_DROP, NF_QUEUE, NFT_GOTO, NFT_JUMP, NFT_RETURN, Chain, Element, Rule,
                              Rulesets, verdict_in)
from .packet import ESTABLISHED, ETHERTYPES, MAYBE, NO, SCTP, TCP, UNTRACKED, YES, Bytes, Facts, Packet, Tuple

ACCEPT, DROP, REJECT, QUEUE, JUMP, GOTO, RETURN, STOLEN = (
    "accept", "drop", "reject", "queue", "jump", "goto", "return", "stolen")
DNAT, SNAT, MASQUERADE, REDIRECT = "dnat", "snat", "masquerade", "redirect"
VERDICTS = {NF_DROP: DROP, NF_ACCEPT: ACCEPT, NF_QUEUE: QUEUE, NFT_JUMP: JUMP, NFT_GOTO: GOTO, NFT_RETURN: RETURN}
CONNTRACK_PRIORITY = -200  # NF_IP_PRI_CONNTRACK


class Verdict(NamedTuple):
    """An end of a rule. `chain`: of a jump or goto; `address`, `port`: of a translation, None for what is not known."""

    kind: str
    chain: str = ""
    address: bytes | None = None
    port: int | None = None


class Context:
    """A rule's surroundings: where a packet is, and what it can ask."""

    __slots__ = ("chain", "facts", "hook", "match", "packet", "priority", "registers", "rulesets", "sources", "sure")

    def __init__(self, rulesets: Rulesets, facts: Facts, packet: Packet, chain: Chain, priority: int) -> None:
        self.rulesets, self.facts, self.packet = rulesets, facts, packet
        self.chain, self.hook, self.priority = chain, chain.hook, priority
        self.sure = True  # whether every packet like this comes to this rule
        self.match = YES  # whether the rule has matched so far
        self.registers: Bytes = [None] * 64
        self.sources: dict[int, bool] = {}  # places in them that hold an address of the packet that is not known

    @property
    def certain(self) -> bool:
        """Whether what the rule does now happens to every packet like this."""
        return self.sure and self.match == YES

    @property
    def tracked(self) -> bool:
        """Whether connection tracking has seen the packet: it is a hook of its own, at priority -200."""
        return self.hook not in ("prerouting", "output") or self.priority > CONNTRACK_PRIORITY

    def load(self, register: int, size: int) -> Bytes:
        """The first bytes of a register."""
        at = _place(register)
        return self.registers[at:at + size]

    def store(self, register: int, value: Bytes) -> None:
        """Write a register, padded to 32 bits."""
        at = _place(register)
        self.registers[at:at + len(value) + -len(value) % 4] = [*value, *[0] * (-len(value) % 4)]
        self.sources.pop(at, None)


def _place(register: int) -> int:
    return (register - 1) * 16 if register < 8 else (register - 8) * 4


def evaluate(rule: Rule, context: Context) -> tuple[str, list[tuple[str, Verdict]]]:
    """Whether a rule matches, and its verdicts, each with YES or MAYBE: whether the packet takes it.

    It changes the packet as the rule does; where that is not certain the changed field is unknown afterwards.
    """
    context.match = YES
    for name, fields in rule.expressions:
        if name == "immediate" and fields.get(1) == NFT_REG_VERDICT:
            verdict = _verdict(dict(attributes(fields.get(2, b""))))
            return context.match, [(context.match, verdict)] if verdict else []
        if name == "lookup" and fields.get(3) == NFT_REG_VERDICT:
            return context.match, _verdict_map(context, fields)
        known = READERS.get(name)
        if known is None:
            context.registers[:] = [None] * 64  # whichever it writes
        result = known(context, fields) if known else MAYBE
        if isinstance(result, Verdict):
            return context.match, [(context.match, result)]
        if result == NO:
            return NO, []
        if result == MAYBE:
            context.match = MAYBE
    return context.match, []


def _verdict(data: dict[int, bytes]) -> Verdict | None:
    found = verdict_in(data)
    if found is None or found[0] not in VERDICTS:  # NFT_CONTINUE, NFT_BREAK
        return None
    return Verdict(VERDICTS[found[0]], found[1])


# --- comparing ------------------------------------------------------------------------------------------------

def _number(fields: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(fields.get(kind, b""), "big")


def _data(fields: dict[int, bytes], kind: int) -> bytes:
    return dict(attributes(fields.get(kind, b""))).get(1, b"")  # NFTA_DATA_VALUE


def bounds(value: Bytes) -> tuple[bytes, bytes]:
    """The least and the greatest that a value can be."""
    return bytes(byte or 0 for byte in value), bytes(255 if byte is None else byte for byte in value)


def equal(value: Bytes, wanted: bytes) -> str:
    """Whether a value is another."""
    if any(byte is not None and byte != its for byte, its in zip(value, wanted, strict=False)):
        return NO
    return MAYBE if None in value[:len(wanted)] else YES


def invert(result: str) -> str:
    """The contrary; MAYBE stays."""
    return {YES: NO, NO: YES, MAYBE: MAYBE}[result]


def between(value: Bytes, first: bytes, last: bytes) -> str:
    """Whether a value is in a range, the ends included."""
    low, high = bounds(value)
    if first <= low and high <= last:
        return YES
    return NO if high < first or last < low else MAYBE


def _cmp(context: Context, fields: dict[int, bytes]) -> str:
    wanted, operator = _data(fields, 3), _number(fields, 2)
    register = _number(fields, 1)
    value = context.load(register, len(wanted))
    if operator in (0, 1):  # NFT_CMP_EQ, NFT_CMP_NEQ
        result = equal(value, wanted)
        if result == MAYBE and context.sources.get(_place(register)) and is_nobody(wanted, context.packet.family):
            result = NO
        return result if operator == 0 else invert(result)
    low, high = bounds(value)
    if operator in (2, 5):  # LT, GTE
        result = YES if high < wanted else NO if low >= wanted else MAYBE
        return result if operator == 2 else invert(result)
    result = YES if high <= wanted else NO if low > wanted else MAYBE  # LTE, GT
    return result if operator == 3 else invert(result)


def is_nobody(address: bytes, family: int) -> bool:
    """Whether no client has an address, or a network that begins so: unspecified, localhost, multicast."""
    if family == 6:
        return (len(address) == 16 and not any(address[:15])) or address[:1] == b"\xff"
    return address[:1] in (b"\0", b"\x7f") or address[:1] >= b"\xe0"


def _range(context: Context, fields: dict[int, bytes]) -> str:
    first, last = _data(fields, 3), _data(fields, 4)
    result = between(context.load(_number(fields, 1), len(first)), first, last)
    return result if not _number(fields, 2) else invert(result)


def _bitwise(context: Context, fields: dict[int, bytes]) -> str:
    size, register, operator = _number(fields, 3), _number(fields, 1), _number(fields, 6)
    value = context.load(register, size)
    source = context.sources.get(_place(register), False)
    if operator:
        context.store(_number(fields, 2), _shifted(value, operator, _data(fields, 7)))
        return YES
    mask, exclusive = _data(fields, 4), _data(fields, 5)
    context.store(_number(fields, 2), [other if not its else None if byte is None else byte & its ^ other
                                       for byte, its, other in zip(value, mask, exclusive, strict=False)])
    if source and not any(exclusive):
        context.sources[_place(_number(fields, 2))] = True
    return YES


def _shifted(value: Bytes, operator: int, by: bytes) -> Bytes:
    """A value shifted left (1) or right (2): of one word, in the host's order; of more, nothing is known."""
    if operator > 2 or None in value or len(value) != 4 or len(by) != 4:
        return [None] * len(value)
    number, bits = int.from_bytes(bytes(byte or 0 for byte in value), "little"), int.from_bytes(by, "little")
    return _host((number << bits if operator == 1 else number >> bits) & 0xffffffff)


def _byteorder(context: Context, fields: dict[int, bytes]) -> str:
    length, size = _number(fields, 4), _number(fields, 5)
    value = context.load(_number(fields, 1), length)
    swapped: Bytes = []
    for at in range(0, length, size):
        swapped += value[at:at + size][::-1]
    context.store(_number(fields, 2), swapped)
    return YES


def _immediate(context: Context, fields: dict[int, bytes]) -> str:
    context.store(_number(fields, 1), [*_data(fields, 2)])
    return YES


# --- what a packet is -----------------------------------------------------------------------------------------

def _payload(context: Context, fields: dict[int, bytes]) -> str:
    if 5 in fields:  # NFTA_PAYLOAD_SREG: it writes; neither address nor port are expected to be rewritten so
        return YES
    base, offset, size = _number(fields, 2), _number(fields, 3), _number(fields, 4)
    if base == 0 and context.packet.local:
        return NO  # there is no link header yet
    if base > 2:
        context.store(_number(fields, 1), [None] * size)
        return MAYBE
    header = context.packet.header(base)
    value = header[offset:offset + size]
    value += [None] * (size - len(value))
    context.store(_number(fields, 1), value)
    source, destination = ((12, 4), (16, 4)) if context.packet.family == 4 else ((8, 16), (24, 16))
    if base == 1 and None in value and offset in (source[0], destination[0]) and size <= source[1]:
        context.sources[_place(_number(fields, 1))] = True
    return YES


def _name(name: str) -> Bytes:
    return [*name.encode().ljust(16, b"\0")]


def _host(number: int | None, size: int = 4) -> Bytes:
    return [None] * size if number is None else [*number.to_bytes(size, "little")]


def _mark_in(context: Context, register: int) -> int | None:
    """The mark that a rule sets from a register; None where that is not certain."""
    value = context.load(register, 4)
    sure = context.certain and None not in value
    return int.from_bytes(bytes(byte or 0 for byte in value), "little") if sure else None


def _meta(context: Context, fields: dict[int, bytes]) -> str:
    packet, key = context.packet, _number(fields, 2)
    if 3 in fields:  # NFTA_META_SREG
        if key == 3:
            packet.mark = _mark_in(context, _number(fields, 3))
        return YES
    read = _META.get(key)
    found = read(context, packet) if read else None
    if isinstance(found, str):
        return found
    context.store(_number(fields, 1), [None] * (16 if key in (6, 7, 26, 27) else 4) if found is None else found)
    return YES


def _link(context: Context, name: str, read: "Callable[[Link], Bytes]") -> Bytes | str | None:
    if not name:
        return NO  # the expression breaks
    link = context.facts.link(name)
    return None if link is None else read(link)


def _index(context: Context, name: str) -> Bytes:
    link = context.facts.link(name) if name else None
    return _host(link.number if link else 0 if not name else None)


_META: "dict[int, Callable[[Context, Packet], Bytes | str | None]]" = {
    1: lambda context, packet: [ETHERTYPES[packet.family] >> 8, ETHERTYPES[packet.family] & 255],
    3: lambda context, packet: _host(packet.mark),
    4: lambda context, packet: _index(context, packet.iif),
    5: lambda context, packet: _index(context, packet.oif),
    6: lambda context, packet: _name(packet.iif),
    7: lambda context, packet: _name(packet.oif),
    8: lambda context, packet: _link(context, packet.iif, lambda link: _host(link.type, 2)),
    9: lambda context, packet: _link(context, packet.oif, lambda link: _host(link.type, 2)),
    10: lambda context, packet: None if packet.local else NO,
    11: lambda context, packet: None if packet.local else NO,
    15: lambda context, packet: [2 if packet.family == 4 else 10],
    16: lambda context, packet: [packet.protocol],
    19: lambda context, packet: [0] if not packet.local else None,  # PACKET_HOST
    21: lambda context, packet: _link(context, packet.iif, lambda link: _host(link.group)),
    22: lambda context, packet: _link(context, packet.oif, lambda link: _host(link.group)),
    25: lambda context, packet: [0],  # no IPsec
    26: lambda context, packet: _link(context, packet.iif, lambda link: _name(link.kind)),
    27: lambda context, packet: _link(context, packet.oif, lambda link: _name(link.kind)),
}

CT_INVALID, CT_ESTABLISHED, CT_NEW, CT_UNTRACKED = 1, 2, 8, 64  # NF_CT_STATE_*


def ct_state(context: Context) -> int:
    """The bit of the packet's state (NF_CT_STATE_BIT)."""
    if not context.tracked:
        return CT_UNTRACKED if context.packet.state == UNTRACKED else CT_INVALID
    return {ESTABLISHED: CT_ESTABLISHED, UNTRACKED: CT_UNTRACKED}.get(context.packet.state, CT_NEW)


def has_ct(context: Context) -> bool:
    """Whether the packet has a connection."""
    return context.tracked and context.packet.state != UNTRACKED


def _ct(context: Context, fields: dict[int, bytes]) -> str:
    packet, key = context.packet, _number(fields, 2)
    if 4 in fields:  # NFTA_CT_SREG
        if key == 3:
            packet.ct_mark = _mark_in(context, _number(fields, 4))
        return YES
    register = _number(fields, 1)
    if key == 0:
        context.store(register, _host(ct_state(context)))
        return YES
    read = _CT.get(key)
    if not has_ct(context) or key == 6 or key in _CT_OF_FAMILY[10 - packet.family]:  # no helper
        return NO
    way = packet.original if not _number(fields, 3) else packet.replies
    value: Bytes = read(packet, way) if read else [None] * _CT_SIZES.get(key, 4)
    context.store(register, value)
    if key in (8, 9, 19, 20, 21, 22) and None in value:
        context.sources[_place(register)] = True
    return YES


def _address(address: bytes | None, packet: Packet) -> Bytes:
    return [None] * (4 if packet.family == 4 else 16) if address is None else [*address]


def _status(packet: Packet, way: Tuple) -> Bytes:
    value = _host(packet.status)
    if packet.state == ESTABLISHED:  # SEEN_REPLY and CONFIRMED; of TCP mostly ASSURED
        value[0] = packet.status & 0x30 | (0x0e if packet.protocol == TCP else 0x0a)
    return value


_CT: "dict[int, Callable[[Packet, Tuple], Bytes]]" = {
    1: lambda packet, way: [int(packet.reply)],
    2: _status,
    3: lambda packet, way: _host(packet.ct_mark),
    7: lambda packet, way: [2 if packet.family == 4 else 10],
    **dict.fromkeys((8, 19, 21), lambda packet, way: _address(way.source, packet)),
    **dict.fromkeys((9, 20, 22), lambda packet, way: _address(way.destination, packet)),
    10: lambda packet, way: [packet.protocol],
    11: lambda packet, way: [*way.sport.to_bytes(2, "big")],
    12: lambda packet, way: [*way.dport.to_bytes(2, "big")],
    17: lambda packet, way: [0, 0],  # the zone
}
_CT_OF_FAMILY = {4: (19, 20), 6: (21, 22)}  # SRC_IP, DST_IP; SRC_IP6, DST_IP6: the other family has none
_CT_SIZES = {13: 16, 14: 8, 15: 8, 16: 8}  # labels, packets, bytes, average


def _fib(context: Context, fields: dict[int, bytes]) -> str:
    packet, result, flags = context.packet, _number(fields, 2), _number(fields, 3)
    address = packet.source if flags & 1 else packet.destination  # NFTA_FIB_F_SADDR
    mark = packet.mark or 0 if flags & 4 else 0
    interface = packet.iif if flags & 8 else packet.oif if flags & 16 else ""
    if result == 3:  # NFT_FIB_RESULT_ADDRTYPE
        if address is None:
            value: Bytes = [1 if byte is None else byte for byte in _host(1)]  # RTN_UNICAST: somebody else's
        else:
            value = _host(context.facts.type_of(packet.family, address, interface))
        context.store(_number(fields, 1), value)
        return YES
    found = interface or packet.iif if address is None else context.facts.route_to(packet.family, address, mark)
    if address is not None and interface and found != interface:
        found = ""
    if flags & 32:  # NFTA_FIB_F_PRESENT
        context.store(_number(fields, 1), [int(bool(found))])
    elif result == 2:
        context.store(_number(fields, 1), _name(found))
    else:
        link = context.facts.link(found) if found else None
        context.store(_number(fields, 1), _host(link.number if link else 0))
    return YES


def _exthdr(context: Context, fields: dict[int, bytes]) -> str:
    """An ordinary packet has no extension headers; of TCP's options a SYN has some, with values that are not known."""
    if 7 in fields:  # NFTA_EXTHDR_SREG: it writes, as `tcp option maxseg size set` does
        return YES
    operator, register = _number(fields, 6), _number(fields, 1)
    if operator == 1 and context.packet.protocol == TCP:
        context.store(register, [None] * max(_number(fields, 4), 1))
        return MAYBE
    if operator == 3 and context.packet.protocol == SCTP:
        context.store(register, [None] * max(_number(fields, 4), 1))
        return MAYBE
    if _number(fields, 5) & 1:  # NFT_EXTHDR_F_PRESENT
        context.store(register, [0])
        return YES
    return NO


# --- sets -----------------------------------------------------------------------------------------------------

def _candidates(context: Context, fields: dict[int, bytes]) -> tuple[str, list[Element]]:
    """Whether a set has the value, and the elements that it may be."""
    found = context.rulesets.set_of(context.chain, fields.get(1, b""))
    sized = next((element.key for element in found.elements if element.key), b"")
    value = context.load(_number(fields, 2), len(sized))
    fallback = [element for element in found.elements if element.key is None]
    if found.fields:
        hits = [(_in_concatenation(value, element, found.fields), element) for element in found.elements
                if element.key is not None]
    elif found.is_interval:
        hits = _in_intervals(value, [element for element in found.elements if element.key is not None])
    else:
        hits = [(equal(value, element.key), element) for element in found.elements if element.key is not None]
    certain = [element for result, element in hits if result == YES and not element.is_limited]
    if certain:
        return YES, certain[:1]
    possible = [element for result, element in hits if result != NO]
    if context.sources.get(_place(_number(fields, 2))):
        possible = [element for element in possible if not is_nobody(element.key or b"\1", context.packet.family)]
    if possible:
        return (YES if fallback else MAYBE), possible + fallback
    return (YES, fallback) if fallback else (NO, [])


def _in_concatenation(value: Bytes, element: Element, fields: tuple[int, ...]) -> str:
    at, result = 0, YES
    last = element.last if element.last is not None else element.key or b""
    for size in fields:
        its = between(value[at:at + size], (element.key or b"")[at:at + size], last[at:at + size])
        if its == NO:
            return NO
        result = its if result == YES else result
        at += size + -size % 4
    return result


def _in_intervals(value: Bytes, elements: list[Element]) -> list[tuple[str, Element]]:
    """Intervals are a start and, as an element of its own, the first value behind their end."""
    found = []
    # Where one interval ends as the next begins, the kernel lists an end and a start with the same key.
    ordered = sorted(elements, key=lambda element: (element.key or b"", not element.is_end))
    for index, element in enumerate(ordered):
        if element.is_end:
            continue
        key = element.key or b""
        if element.last is not None:
            last = element.last
        else:
            behind = next((other.key or b"" for other in ordered[index + 1:] if other.key != key or other.is_end), None)
            last = b"\xff" * len(key) if behind is None else \
                max(int.from_bytes(behind, "big") - 1, 0).to_bytes(len(key), "big")
        found.append((between(value, key, last), element))
    return found


def _lookup(context: Context, fields: dict[int, bytes]) -> str:
    result, elements = _candidates(context, fields)
    if 3 in fields:  # NFTA_LOOKUP_DREG: a map
        if result != NO:
            known = elements[0].data if len(elements) == 1 and result == YES else None
            size = len(elements[0].data)
            context.store(_number(fields, 3), [*known] if known is not None else [None] * size)
        return result
    return invert(result) if _number(fields, 5) & 1 else result  # NFT_LOOKUP_F_INV


def _verdict_map(context: Context, fields: dict[int, bytes]) -> list[tuple[str, Verdict]]:
    result, elements = _candidates(context, fields)
    sure = context.match == YES and result == YES and len(elements) == 1
    return [(YES if sure else MAYBE, Verdict(VERDICTS[element.verdict[0]], element.verdict[1]))
            for element in elements if element.verdict and element.verdict[0] in VERDICTS]


# --- what a rule does -----------------------------------------------------------------------------------------

def _nat(context: Context, fields: dict[int, bytes]) -> Verdict:
    kind = DNAT if _number(fields, 1) else SNAT
    size = 4 if context.packet.family == 4 else 16
    address = _known(context, fields, 3, 4, size)
    port = _known(context, fields, 5, 6, 2)
    return Verdict(kind, "", address, int.from_bytes(port, "big") if port else None)


def _known(context: Context, fields: dict[int, bytes], first: int, last: int, size: int) -> bytes | None:
    if first not in fields:
        return None
    value = context.load(_number(fields, first), size)
    if last in fields and context.load(_number(fields, last), size) != value:
        return None
    return None if None in value else bytes(byte or 0 for byte in value)


def _redir(context: Context, fields: dict[int, bytes]) -> Verdict:
    port = _known(context, fields, 1, 2, 2)
    return Verdict(REDIRECT, "", None, int.from_bytes(port, "big") if port else None)


def _notrack(context: Context, fields: dict[int, bytes]) -> str:
    untrack(context)
    return YES


def untrack(context: Context) -> None:
    """Let the packet pass connection tracking by, before that has seen it: if it is certain."""
    if not context.tracked:
        if context.certain:
            context.packet.state = UNTRACKED
        context.packet.may_be_untracked = True


def _passes(context: Context, fields: dict[int, bytes]) -> str:
    return YES


def _dynset(context: Context, fields: dict[int, bytes]) -> str:
    return MAYBE if 7 in fields or 10 in fields else YES  # with a limit or a counter of its own


def _objref(context: Context, fields: dict[int, bytes]) -> str:
    return MAYBE if _number(fields, 1) in (2, 4, 5) else YES  # NFT_OBJECT_QUOTA, _LIMIT, _CONNLIMIT


def _match(context: Context, fields: dict[int, bytes]) -> str:
    from .xtables import matches
    return matches(context, fields)


def _target(context: Context, fields: dict[int, bytes]) -> "str | Verdict":
    from .xtables import target
    return target(context, fields)


def _legacy(context: Context, fields: dict[int, bytes]) -> str:
    from .xtables import header_matches
    return header_matches(context, fields[1])


def _reject(context: Context, fields: dict[int, bytes]) -> Verdict:
    return Verdict(REJECT)


def _queue(context: Context, fields: dict[int, bytes]) -> Verdict:
    return Verdict(QUEUE)


READERS: "dict[str, Callable[[Context, dict[int, bytes]], str | Verdict]]" = {
    "payload": _payload, "meta": _meta, "ct": _ct, "fib": _fib, "exthdr": _exthdr,
    "cmp": _cmp, "range": _range, "bitwise": _bitwise, "byteorder": _byteorder, "lookup": _lookup,
    "immediate": _immediate, "nat": _nat, "redir": _redir,
    "masq": lambda context, fields: Verdict(MASQUERADE),
    "reject": _reject, "queue": _queue, "notrack": _notrack, "dynset": _dynset, "objref": _objref,
    "fwd": lambda context, fields: Verdict(STOLEN), "synproxy": lambda context, fields: Verdict(STOLEN),
    "match": _match, "target": _target, "legacy": _legacy,
    **dict.fromkeys(("counter", "log", "dup", "last", "flow_offload"), _passes),
}
