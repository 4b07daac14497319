"""A rule of iptables as iptables writes it, from its matches and its target.

nft prints those of iptables-nft without what they compare, and nothing prints those of iptables-legacy where its own
programs are not installed.
"""
import ipaddress
from struct import error, unpack_from

from ..linux.netlink import attributes
from ..linux.rulesets import NFT_GOTO, Rule, verdict_in
from .xtables import translation

_STATES = {1: "INVALID", 2: "ESTABLISHED", 4: "RELATED", 8: "NEW", 64: "SNAT", 128: "DNAT", 256: "UNTRACKED"}
_TYPES = ("UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST", "BLACKHOLE", "UNREACHABLE", "PROHIBIT")
_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp", 1: "icmp", 58: "ipv6-icmp"}
_REJECTS = {4: ("icmp-net-unreachable", "icmp-host-unreachable", "icmp-proto-unreachable", "icmp-port-unreachable",
                "echo-reply", "icmp-net-prohibited", "icmp-host-prohibited", "tcp-reset", "icmp-admin-prohibited"),
            6: ("icmp6-no-route", "icmp6-adm-prohibited", "icmp6-not-neighbour", "icmp6-addr-unreachable",
                "icmp6-port-unreachable", "icmp6-echo-reply", "tcp-reset")}


def is_iptables(rule: Rule) -> bool:
    """Whether a rule has a match or target of iptables, or is one of iptables-legacy."""
    return any(name in ("legacy", "match", "target") for name, _ in rule.expressions)


def text_of(rule: Rule, family: int) -> str:
    """The rule, as far as it is iptables' own: "-p tcp -m tcp --dport 80 -j DROP"."""
    words = []
    for name, fields in rule.expressions:
        try:
            if name == "legacy":
                words += _header(fields[1])
            elif name == "match":
                words.append(_match(fields))
            elif name == "target":
                words.append(_target(fields, family))
            elif name == "immediate":
                verdict = verdict_in(dict(attributes(fields.get(2, b""))))
                if verdict:
                    words.append(f"{'-g' if verdict[0] == NFT_GOTO else '-j'} "
                                 f"{verdict[1] or {0: 'DROP', 1: 'ACCEPT', 3: 'QUEUE', -5: 'RETURN'}[verdict[0]]}")
        except (error, IndexError, KeyError, ValueError):
            words.append(f"[{name}]")
    return " ".join(words)


def _header(header: bytes) -> list[str]:
    size = 4 if len(header) == 84 else 16
    inverse = header[83] if size == 4 else header[132]
    words = []
    for option, at, flag in ("-s", 0, 0x08), ("-d", size, 0x10):
        mask = header[at + 2 * size:at + 3 * size]
        if any(mask):
            length = int.from_bytes(mask, "big").bit_count()
            words.append(f"{'! ' if inverse & flag else ''}{option} "
                         f"{ipaddress.ip_address(header[at:at + size])}/{length}")
    for option, at, flag in ("-i", 4 * size, 0x01), ("-o", 4 * size + 16, 0x02):
        name, mask = header[at:at + 16].rstrip(b"\0").decode(errors="replace"), header[at + 32:at + 48]
        if any(mask):
            wildcard = "" if mask[len(name):len(name) + 1] == b"\xff" else "+"
            words.append(f"{'! ' if inverse & flag else ''}{option} {name}{wildcard}")
    protocol, = unpack_from("=H", header, 4 * size + 64)
    if protocol:
        words.append(f"{'! ' if inverse & 0x40 else ''}-p {_PROTOCOLS.get(protocol, protocol)}")
    return words


def _match(fields: dict[int, bytes]) -> str:
    name, data = fields[1][:-1].decode(errors="replace"), fields.get(3, b"")
    revision = int.from_bytes(fields.get(2, b""), "big")
    detail = ""
    if name in ("tcp", "udp"):
        inverse = data[11 if name == "tcp" else 8]
        for option, at, flag in ("--sport", 0, 1), ("--dport", 4, 2):
            first, last = unpack_from("=HH", data, at)
            if (first, last) != (0, 65535):
                ports = str(first) if first == last else f"{first}:{last}"
                detail += f" {'! ' if inverse & flag else ''}{option} {ports}"
        if name == "tcp" and data[9]:
            detail += f" --tcp-flags {data[9]:#04x} {data[10]:#04x}"
    elif name == "multiport":
        ports = ",".join(map(str, unpack_from("=15H", data, 2)[:data[1]]))
        detail = f" {'! ' if data[47] else ''}{('--sports', '--dports', '--ports')[data[0]]} {ports}"
    elif name in ("state", "conntrack"):
        flags, inverse = unpack_from("=HH", data, 146) if name == "conntrack" else (1, 0)
        states, = unpack_from("=I", data, 0) if name == "state" else unpack_from("=H", data, 150) if revision > 1 else \
            (data[150],)
        if flags & 1:
            named = ",".join(word for bit, word in _STATES.items() if states & bit)
            detail = f" {'! ' if inverse & 1 else ''}--{'ct' if name == 'conntrack' else ''}state {named}"
    elif name == "addrtype" and revision:
        sources, destinations, flags = unpack_from("=HHI", data, 0)
        for option, types, flag in ("--src-type", sources, 1), ("--dst-type", destinations, 2):
            if types:
                named = ",".join(word for index, word in enumerate(_TYPES) if types >> index & 1)
                detail += f" {'! ' if flags & flag else ''}{option} {named}"
    elif name in ("mark", "connmark"):
        mark, mask = unpack_from("=II", data, 0)
        detail = f" {'! ' if data[8] else ''}--mark {mark:#x}/{mask:#x}"
    elif name == "comment":
        detail = f" --comment \"{data.rstrip(bytes(1)).split(bytes(1))[0].decode(errors='replace')}\""
    return f"-m {name}{detail}"


def _target(fields: dict[int, bytes], family: int) -> str:
    name, data = fields[1][:-1].decode(errors="replace"), fields.get(3, b"")
    if name in ("DNAT", "SNAT", "REDIRECT"):
        address, port = translation(data, int.from_bytes(fields.get(2, b""), "big"), family, name)
        shown = "" if address is None else str(ipaddress.ip_address(address))
        shown = f"[{shown}]" if ":" in shown else shown
        option = {"DNAT": "--to-destination ", "SNAT": "--to-source ", "REDIRECT": "--to-ports "}[name]
        return f"-j {name} {option}{shown}{':' if shown and port else ''}{port or ''}"
    if name == "REJECT":
        return f"-j REJECT --reject-with {_REJECTS[family][data[0]]}"
    if name in ("MARK", "CONNMARK"):
        return f"-j {name} {unpack_from('=I', data, 0)[0]:#x}/{unpack_from('=I', data, 4)[0]:#x}"
    if name == "CT" and data[0] & 1:
        return "-j CT --notrack"
    return f"-j {name}"
