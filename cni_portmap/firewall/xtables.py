"""Matches and targets of iptables, whose data iptables-nft and iptables-legacy have in the same form.

Source: include/uapi/linux/netfilter/xt_*.h, netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h; kernel:
net/netfilter/xt_*.c. Numbers are in the host's order but ports and addresses, which are in network order.
"""
from collections.abc import Callable
from struct import Struct, unpack_from
from typing import Any

from .expressions import (DNAT, DROP, MASQUERADE, QUEUE, REDIRECT, REJECT, SNAT, STOLEN, Context, Verdict, between,
                          ct_state, has_ct, invert, is_nobody, untrack)
from .packet import ESTABLISHED, ICMP, ICMPV6, MAYBE, NO, SCTP, TCP, UDP, YES, Bytes, Tuple

_XT_UNTRACKED = {"state": 1 << 6, "conntrack": 1 << 8}  # XT_STATE_UNTRACKED, XT_CONNTRACK_STATE_UNTRACKED
_CT_UNTRACKED = 64
_SNAT, _DNAT = 1 << 6, 1 << 7  # XT_CONNTRACK_STATE_SNAT, _DNAT


def all_of(*results: str) -> str:
    """Whether all hold."""
    return NO if NO in results else MAYBE if MAYBE in results else YES


def inverted(result: str, by: int) -> str:
    """A result, or its contrary."""
    return invert(result) if by else result


def matches(context: Context, fields: dict[int, bytes]) -> str:
    """Whether a match (NFTA_MATCH_NAME, _REV, _INFO) holds; MAYBE for one that this module does not know."""
    name = fields.get(1, b"")[:-1].decode(errors="replace")
    known = MATCHES.get(name)
    if known is None:
        return MAYBE
    try:
        return known(context, fields.get(3, b""), int.from_bytes(fields.get(2, b""), "big"))
    except (IndexError, ValueError, _Short):
        return MAYBE


class _Short(Exception):
    pass


def _read(layout: str, data: bytes, at: int) -> "tuple[Any, ...]":
    shape = Struct(layout)
    if len(data) < at + shape.size:
        raise _Short
    return shape.unpack_from(data, at)


# --- the header of an entry of iptables-legacy ----------------------------------------------------------------

_INV = {"in": 0x01, "out": 0x02, "tos": 0x04, "source": 0x08, "destination": 0x10, "fragment": 0x20, "protocol": 0x40}


def header_matches(context: Context, header: bytes) -> str:
    """Whether the header of an entry matches: struct ipt_ip (84 bytes) or ip6t_ip6 (136)."""
    packet = context.packet
    size, v4 = (4, True) if len(header) == 84 else (16, False)
    if (packet.family == 4) != v4:
        return NO
    links = 4 * size
    protocol, = unpack_from("=H", header, links + 64)
    flags, inverse = (header[82], header[83]) if v4 else (header[131], header[132])
    source, destination = header[:size], header[size:2 * size]
    masks = header[2 * size:3 * size], header[3 * size:4 * size]
    results = [
        inverted(_masked(packet.source, source, masks[0], packet.family), inverse & _INV["source"]),
        inverted(_masked(packet.destination, destination, masks[1], packet.family), inverse & _INV["destination"]),
        inverted(_interface(packet.iif, header[links:links + 16], header[links + 32:links + 48]), inverse & _INV["in"]),
        inverted(_interface(packet.oif, header[links + 16:links + 32], header[links + 48:links + 64]),
                 inverse & _INV["out"])]
    if protocol and (v4 or flags & 0x01):  # IP6T_F_PROTO
        results.append(inverted(YES if protocol == packet.protocol else NO, inverse & _INV["protocol"]))
    if v4 and flags & 0x01:  # IPT_F_FRAG: only later fragments
        results.append(inverted(NO, inverse & _INV["fragment"]))
    return all_of(*results)


def _masked(address: bytes | None, wanted: bytes, mask: bytes, family: int) -> str:
    if not any(mask):
        return YES
    if address is None:
        return NO if is_nobody(wanted, family) else MAYBE
    return YES if all(byte & its == other for byte, other, its in zip(address, wanted, mask, strict=True)) else NO


def _interface(name: str, wanted: bytes, mask: bytes) -> str:
    its = name.encode().ljust(16, b"\0")
    return YES if all(byte & bits == other & bits for byte, other, bits in zip(its, wanted, mask, strict=True)) else NO


# --- matches --------------------------------------------------------------------------------------------------

def _yes(context: Context, data: bytes, revision: int) -> str:
    return YES


def _no(context: Context, data: bytes, revision: int) -> str:
    return NO


def _ports(value: int, between: "tuple[int, ...]", inverse: int) -> str:
    return inverted(YES if between[0] <= value <= between[1] else NO, inverse)


def _tcp(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    if packet.protocol != TCP:
        return NO
    sources, destinations = _read("=HH", data, 0), _read("=HH", data, 4)
    option, mask, wanted, inverse = _read("=BBBB", data, 8)
    flags = YES if packet.flags & mask == wanted else NO
    return all_of(_ports(packet.sport, sources, inverse & 1), _ports(packet.dport, destinations, inverse & 2),
                  inverted(flags, inverse & 4), YES if not option else MAYBE)


def _udp(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    if packet.protocol != UDP:
        return NO
    sources, destinations = _read("=HH", data, 0), _read("=HH", data, 4)
    inverse, = _read("=B", data, 8)
    return all_of(_ports(packet.sport, sources, inverse & 1), _ports(packet.dport, destinations, inverse & 2))


def _sctp(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    if packet.protocol != SCTP:
        return NO
    destinations, sources = _read("=HH", data, 0), _read("=HH", data, 4)
    flags, inverse = _read("=II", data, 60)
    return all_of(_ports(packet.sport, sources, inverse & 1) if flags & 1 else YES,
                  _ports(packet.dport, destinations, inverse & 2) if flags & 2 else YES, MAYBE if flags & 4 else YES)


def _multiport(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    if packet.protocol not in (TCP, UDP, SCTP):
        return NO
    which, count = _read("=BB", data, 0)
    ports = _read("=15H", data, 2)
    ranges, inverse = (_read("=15B", data, 32), data[47]) if revision else ((0,) * 15, 0)
    found, at = False, 0
    while at < min(count, 15):
        first = last = ports[at]
        if ranges[at] and at + 1 < 15:
            at += 1
            last = ports[at]
        at += 1
        found |= (which in (0, 2) and first <= packet.sport <= last) or \
            (which in (1, 2) and first <= packet.dport <= last)
    return inverted(YES if found else NO, inverse)


def _state(context: Context, data: bytes, revision: int) -> str:
    wanted, = _read("=I", data, 0)
    bit = ct_state(context)
    return YES if wanted & (_XT_UNTRACKED["state"] if bit == _CT_UNTRACKED else bit) else NO


def _conntrack(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    flags, inverse = _read("=HH", data, 146)
    states, statuses = _read("=HH", data, 150) if revision >= 2 else _read("=BB", data, 150)
    results = []
    if flags & 0x001:
        bit = ct_state(context)
        bits = _XT_UNTRACKED["conntrack"] if bit == _CT_UNTRACKED else bit
        if has_ct(context):
            bits |= (_DNAT if packet.status & 0x20 else 0) | (_SNAT if packet.status & 0x10 else 0)
        if states == _DNAT and not packet.status & 0x20 and packet.state == ESTABLISHED:
            results.append(MAYBE if context.hook == "prerouting" and not packet.reply else NO)
        results.append(inverted(YES if states & bits else NO, inverse & 0x001))
    if not has_ct(context):
        return all_of(*results) if flags & 0x001 else NO
    if flags & 0x1000:  # XT_CONNTRACK_DIRECTION
        results.append(inverted(NO if packet.reply else YES, inverse & 0x1000))
    if flags & 0x002:
        protocol, = _read("=H", data, 136)
        results.append(inverted(YES if protocol == packet.protocol else NO, inverse & 0x002))
    size = 4 if packet.family == 4 else 16
    for flag, address, at in ((0x004, packet.original.source, 0), (0x008, packet.original.destination, 32),
                              (0x010, packet.replies.source, 64), (0x020, packet.replies.destination, 96)):
        if flags & flag:
            its = _masked(address, data[at:at + size], data[at + 16:at + 16 + size], packet.family)
            results.append(inverted(its, inverse & flag))
    results += _conntrack_ports(packet.original, packet.replies, data, revision, flags, inverse)
    if flags & 0x040:
        status = MAYBE if packet.state == ESTABLISHED and statuses & 0x0e else \
            YES if statuses & packet.status else NO
        results.append(inverted(status, inverse & 0x040))
    if flags & 0x080:  # XT_CONNTRACK_EXPIRES
        results.append(MAYBE)
    return all_of(*results)


def _conntrack_ports(original: Tuple, replies: Tuple, data: bytes, revision: int, flags: int, inverse: int) \
        -> list[str]:
    found = []
    for index, (flag, port) in enumerate(((0x100, original.sport), (0x200, original.dport), (0x400, replies.sport),
                                          (0x800, replies.dport))):
        if flags & flag:
            if revision >= 3:
                first, = _read("=H", data, 138 + 2 * index)
                last, = _read("=H", data, 154 + 2 * index)
            else:
                first, = last, = _read("!H", data, 138 + 2 * index)
            found.append(_ports(port, (first, last), inverse & flag))
    return found


def _addrtype(context: Context, data: bytes, revision: int) -> str:
    packet = context.packet
    sources, destinations = _read("=HH", data, 0)
    flags, = _read("=I", data, 4) if revision else (0,)
    invert_source, invert_destination = (flags & 1, flags & 2) if revision else _read("=II", data, 4)
    interface = packet.iif if flags & 4 else packet.oif if flags & 8 else ""
    results = []
    for wanted, address, inverse in ((sources, packet.source, invert_source),
                                     (destinations, packet.destination, invert_destination)):
        if wanted:
            kind = 1 if address is None else context.facts.type_of(packet.family, address, interface)
            found = wanted >> kind & 1 if packet.family == 4 else _addrtype6(wanted, kind)
            results.append(inverted(YES if found else NO, inverse))
    return all_of(*results)


def _addrtype6(wanted: int, kind: int) -> bool:
    """Of IPv6, where UNICAST is what is no multicast, this host's own too (net/netfilter/xt_addrtype.c)."""
    if (wanted >> 5 & 1 and kind != 5) or (wanted >> 1 & 1 and kind == 5):
        return False
    return bool(wanted >> kind & 1) if wanted & (1 << 2 | 1 << 4 | 1 << 7) else True


def _mark(context: Context, data: bytes, revision: int) -> str:
    return _marked(context.packet.mark, data)


def _marked(mark: int | None, data: bytes) -> str:
    wanted, mask = _read("=II", data, 0)
    result = YES if not mask and not wanted else MAYBE if mark is None else YES if mark & mask == wanted else NO
    return inverted(result, data[8])


def _connmark(context: Context, data: bytes, revision: int) -> str:
    return _marked(context.packet.ct_mark, data) if has_ct(context) else NO


def _iprange(context: Context, data: bytes, revision: int) -> str:
    size, flags = (4 if context.packet.family == 4 else 16), data[64]
    results = []
    for flag, address, at in ((1, context.packet.source, 0), (2, context.packet.destination, 32)):
        if flags & flag:
            value: Bytes = [None] * size if address is None else [*address]
            its = between(value, data[at:at + size], data[at + 16:at + 16 + size])
            results.append(inverted(its, flags & flag << 4))
    return all_of(*results)


def _pkttype(context: Context, data: bytes, revision: int) -> str:
    wanted, inverse = _read("=II", data, 0)
    if context.packet.local:
        return MAYBE
    return inverted(YES if wanted == 0 else NO, inverse)


def _physdev(context: Context, data: bytes, revision: int) -> str:
    if context.packet.bridged:
        return MAYBE
    inverse, asked = _read("=BB", data, 64)
    return NO if asked & ~inverse else YES  # as the kernel says of packets that cross no bridge


def _dscp(context: Context, data: bytes, revision: int) -> str:
    wanted, inverse = _read("=BB", data, 0)
    return inverted(YES if wanted == 0 else NO, inverse)


def _devgroup(context: Context, data: bytes, revision: int) -> str:
    *groups, flags = _read("=IIIII", data, 0)
    results = []
    for index, name in ((0, context.packet.iif), (1, context.packet.oif)):
        if flags & 1 << 2 * index:
            link = context.facts.link(name) if name else None
            its = MAYBE if name and link is None else YES if link and \
                (link.group ^ groups[2 * index]) & groups[2 * index + 1] == 0 else NO
            results.append(inverted(its, flags & 2 << 2 * index))
    return all_of(*results)


def _rpfilter(context: Context, data: bytes, revision: int) -> str:
    packet, flags = context.packet, data[0]
    if packet.source is None:
        result = YES
    else:
        way = context.facts.route_to(packet.family, packet.source, (packet.mark or 0) if flags & 2 else 0)
        result = YES if way and (flags & 1 or way == packet.iif) else NO
    return inverted(result, flags & 8)


def _policy(context: Context, data: bytes, revision: int) -> str:
    flags, = _read("=H", data, 304)
    return YES if flags & 4 else NO  # XT_POLICY_MATCH_NONE: without IPsec


def _helper(context: Context, data: bytes, revision: int) -> str:
    inverse, = _read("=I", data, 0)
    return YES if inverse and has_ct(context) else NO


def _owner(context: Context, data: bytes, revision: int) -> str:
    return MAYBE if context.packet.local else NO


def _of_protocol(number: int) -> "Callable[[Context, bytes, int], str]":
    return lambda context, data, revision: MAYBE if context.packet.protocol == number else NO


MATCHES: "dict[str, Callable[[Context, bytes, int], str]]" = {
    "tcp": _tcp, "udp": _udp, "sctp": _sctp, "multiport": _multiport, "state": _state, "conntrack": _conntrack,
    "addrtype": _addrtype, "mark": _mark, "connmark": _connmark, "iprange": _iprange, "pkttype": _pkttype,
    "physdev": _physdev, "comment": _yes, "dscp": _dscp, "devgroup": _devgroup, "rpfilter": _rpfilter,
    "policy": _policy, "helper": _helper, "owner": _owner, "icmp": _of_protocol(ICMP), "icmp6": _of_protocol(ICMPV6),
    **dict.fromkeys(("ah", "esp", "dccp", "udplite", "frag", "hbh", "dst", "rt", "mh", "ipcomp", "l2tp"), _no),
}


# --- targets --------------------------------------------------------------------------------------------------

def target(context: Context, fields: dict[int, bytes]) -> "str | Verdict":
    """What a target (NFTA_TARGET_NAME, _REV, _INFO) does: a verdict, or YES where the rule after it comes next."""
    name, data = fields.get(1, b"")[:-1].decode(errors="replace"), fields.get(3, b"")
    revision = int.from_bytes(fields.get(2, b""), "big")
    if name in _ENDS:
        return Verdict(_ENDS[name])
    if name in _NATS:
        address, port = translation(data, revision, context.packet.family, name)
        return Verdict(_NATS[name], "", address, port)
    change = _CHANGES.get(name)
    if change:
        change(context, data, revision)
    return YES


def translation(data: bytes, revision: int, family: int, name: str = "DNAT") -> tuple[bytes | None, int | None]:
    """The address and port of DNAT, SNAT and REDIRECT; None for what stays, or is one of a range.

    struct nf_nat_ipv4_multi_range_compat for IPv4's older revisions, struct nf_nat_range(2) else.
    """
    if family == 4 and revision < (2 if name == "DNAT" else 99):
        if len(data) < 20:
            return None, None
        flags, = unpack_from("=I", data, 4)
        addresses, ports = (data[8:12], data[12:16]), unpack_from("!HH", data, 16)
    else:
        if len(data) < 40:
            return None, None
        size = 4 if family == 4 else 16
        flags, = unpack_from("=I", data, 0)
        addresses, ports = (data[4:4 + size], data[20:20 + size]), unpack_from("!HH", data, 36)
    return (addresses[0] if flags & 1 and addresses[0] == addresses[1] else None,
            ports[0] if flags & 2 and ports[0] == ports[1] else None)


def _set_mark(context: Context, data: bytes, revision: int) -> None:
    packet = context.packet
    if not context.certain or packet.mark is None or revision < 2:
        packet.mark = None
        return
    mark, mask = _read("=II", data, 0)
    packet.mark = packet.mark & ~mask ^ mark


def _connection_mark(context: Context, data: bytes, revision: int) -> None:
    packet = context.packet
    if not has_ct(context):
        return
    mark, mask, its_mask = _read("=III", data, 0)
    mode = data[12]
    known = context.certain and packet.mark is not None and packet.ct_mark is not None
    if mode == 2:  # XT_CONNMARK_RESTORE
        packet.mark = (packet.mark or 0) & ~its_mask ^ (packet.ct_mark or 0) & mask if known else None
    elif mode == 1:  # XT_CONNMARK_SAVE
        packet.ct_mark = (packet.ct_mark or 0) & ~mask ^ (packet.mark or 0) & its_mask if known else None
    else:
        packet.ct_mark = (packet.ct_mark or 0) & ~mask ^ mark if known else None


def _connection(context: Context, data: bytes, revision: int) -> None:
    if _read("=H", data, 0)[0] & 1:  # XT_CT_NOTRACK
        untrack(context)


_ENDS = {"REJECT": REJECT, "DROP": DROP, "QUEUE": QUEUE, "NFQUEUE": QUEUE, "ERROR": DROP, "SYNPROXY": STOLEN}
_NATS = {"DNAT": DNAT, "SNAT": SNAT, "MASQUERADE": MASQUERADE, "REDIRECT": REDIRECT, "NETMAP": DNAT}
_CHANGES: "dict[str, Callable[[Context, bytes, int], None]]" = {
    "MARK": _set_mark, "CONNMARK": _connection_mark, "CT": _connection,
    "NOTRACK": lambda context, data, revision: untrack(context)}

