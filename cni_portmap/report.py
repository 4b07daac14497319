"""What is published, read back from the kernel: for people and their scripts, not for the plugin.

Through netlink, since nft's JSON takes three seconds with 10,000 containers.
"""
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, NamedTuple

from .kernel import Kernel
from .netlink import attributes, expressions
from .ruleset import PROTOCOLS, Owner, claim_of


class Published(NamedTuple):
    """One rule of a container: host ports that lead to container ports, as many and in the same order.

    `connections`: how many were made through it so far; None where the rule is missing. `owner`: "alive", "dead",
    or "unknown" where its network namespace cannot be judged.
    """

    family: int
    protocol: str
    host_ip: str
    host_ports: tuple[int, ...]
    container_ip: str
    container_ports: tuple[int, ...]
    network: str
    container_id: str
    ifname: str
    connections: int | None
    owner: str
    netns: str


class _Rule:
    """A dnat rule, read from its expressions: the ports that it takes, of which address, and where they go.

    Reads what `ruleset` lets libnftables compile, whatever its version: comparisons of the destination port, an
    anonymous set or map of ports, immediate addresses and ports. Source: include/uapi/linux/netfilter/nf_tables.h.
    """

    def __init__(self, raw: bytes, kernel: Kernel) -> None:
        self.packets, self.ip, self.daddr, self.protocol = 0, "", b"", 0
        self.ports: dict[int, int] = {}
        loaded: dict[bytes, tuple[int, int]] = {}  # register -> base and offset of the header field that is in it
        values: dict[bytes, bytes] = {}  # register -> what it is set to
        lowest, highest, hosts, mapped = 0, 65535, [], {}
        for name, fields in expressions(raw):
            if name == "payload":  # NFTA_PAYLOAD_DREG, _BASE, _OFFSET
                loaded[fields[1]] = _number(fields[2]), _number(fields[3])
            elif name == "meta" and 1 in fields:  # NFTA_META_DREG, _KEY
                loaded[fields[1]] = META, _number(fields[2])
            elif name == "cmp":  # NFTA_CMP_SREG, _OP, _DATA
                value, where = _value(fields[3]), loaded.get(fields[1])
                if where == DADDR4 and len(value) == 4 or where == DADDR6 and len(value) == 16:
                    self.daddr = self.daddr or value
                elif where == L4PROTO:
                    self.protocol = value[0]
                elif where == DPORT:
                    operator = _number(fields[2])  # enum nft_cmp_ops
                    lowest = _number(value) if operator in (0, 5) else lowest
                    highest = _number(value) if operator in (0, 3) else highest
            elif name == "range" and loaded.get(fields[1]) == DPORT:  # NFTA_RANGE_SREG, _OP, _FROM_DATA, _TO_DATA
                lowest, highest = _number(_value(fields[3])), _number(_value(fields[4]))
            elif name == "lookup" and loaded.get(fields[2]) == DPORT:  # NFTA_LOOKUP_SET, _SREG, _DREG
                found = {_number(key[:2]): _number(data[:2]) for key, data in kernel.set_elements(fields[1])}
                if 3 in fields:
                    mapped = found
                else:
                    hosts = sorted(found)
            elif name == "immediate":  # NFTA_IMMEDIATE_DREG, _DATA
                values[fields[1]] = _value(fields[2])
            elif name == "counter":  # NFTA_COUNTER_PACKETS
                self.packets = _number(fields[2])
            elif name == "nat":  # NFTA_NAT_REG_ADDR_MIN, _REG_PROTO_MIN
                address, port = values.get(fields.get(3, b""), b""), values.get(fields.get(5, b""), b"")
                if address:
                    self.ip = inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)
                hosts = hosts or [*range(lowest, highest + 1)]
                self.ports = mapped or {host: _number(port[:2]) or host for host in hosts}

    def takes(self, family: int, protocol: int, host: bytes, port: int) -> bool:
        return port in self.ports and (":" in self.ip, self.protocol, self.daddr) == (family == 6, protocol, host)


META = -1
L4PROTO = (META, 16)  # NFT_META_L4PROTO
DPORT, DADDR4, DADDR6 = (2, 2), (1, 16), (1, 24)  # transport and network header, offset


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _value(data: bytes) -> bytes:
    return dict(attributes(data)).get(1, b"")  # NFTA_DATA_VALUE


def published(kernel: Kernel) -> list[Published]:
    """All published ports, by host port. They are what the verdict maps hold: a rule that no element leads to
    does nothing."""
    rules: dict[str, list[_Rule]] = {}
    records: dict[str, list[str]] = {}
    for chain, comment, raw in kernel.rules():
        if chain.startswith("c/"):
            if comment and chain not in rules:
                records.setdefault(chain, []).append(comment)
            elif b"nat\0" in raw:
                rules.setdefault(chain, []).append(_Rule(raw, kernel))
    owners: dict[str, tuple[Owner, str]] = {}
    found: dict[tuple[Any, ...], dict[int, int]] = {}
    for element, chain in kernel.elements():
        family, protocol, host, port = claim_of(element)
        # A condition may compare the destination address as well, so the address need not be the published one.
        rule = next((each for each in rules.get(chain, ()) if each.takes(family, protocol, host, port)), None) or \
            next((each for each in rules.get(chain, ()) if each.takes(family, protocol, each.daddr, port)), None)
        found.setdefault((family, protocol, host, chain, rule), {})[port] = rule.ports[port] if rule else 0
        if chain not in owners:
            owner = Owner(chain, "".join(records.get(chain, [])))
            owners[chain] = owner, _state(owner, kernel)
    lines = []
    for (family, protocol, host, chain, rule), ports in found.items():
        host_ip = inet_ntop(AF_INET if family == 4 else AF_INET6, host or bytes(4 if family == 4 else 16))
        hosts, (owner, state) = tuple(sorted(ports)), owners[chain]
        lines.append(Published(family, PROTOCOLS.get(protocol, str(protocol)), host_ip, hosts, rule.ip if rule else "",
                               tuple(ports[host] for host in hosts), owner.network, owner.container_id, owner.ifname,
                               rule.packets if rule else None, state, owner.netns))
    return sorted(lines, key=lambda line: (line.host_ports[0], line.protocol, line.family, line.host_ip))


def _state(owner: Owner, kernel: Kernel) -> str:
    if not owner.inode:
        return "unknown"
    return "dead" if kernel.is_dead(owner) else "alive"


def ranges(ports: tuple[int, ...]) -> str:
    """Ports as people write them: (80, 9000, 9001, 9002) is "80,9000-9002"."""
    parts: list[list[int]] = []
    for port in ports:
        if parts and port == parts[-1][-1] + 1:
            parts[-1][1:] = [port]
        else:
            parts.append([port])
    return ",".join("-".join(map(str, part)) for part in parts)
