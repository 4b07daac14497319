"""The published ports, read back from the kernel: for people and their scripts, not for the plugin.

Through netlink, since nft's JSON takes three seconds with 10,000 containers.
"""
from socket import AF_INET, AF_INET6, inet_ntop
from typing import TYPE_CHECKING, Any, NamedTuple

from ..attachment import is_localhost
from ..linux.expressions import DnatRule, dnat_rules, packets_in
from ..linux.kernel import Kernel
from ..linux.table import record_in
from ..ruleset import PROTOCOLS, Owner, chain_of, claim_of, elements_for, is_attachment_chain, standby_notes

if TYPE_CHECKING:
    from ..ruleset import Element

SIZES = {4: 4, 6: 16}  # bytes of an address


class Published(NamedTuple):
    """Host ports that lead to container ports, as many and in the same order: a rule, or rules for consecutive ports.

    `connections`: the number of connections through it so far; None if the rule is missing. `owner`: "alive", "dead",
    or "unknown". `pod`: the container's name for people, "" if no runtime sent one. `by`: who has published it,
    "runtime" or "operator". `standby`: who gets it when the owner is removed, as CONTAINER_ID/INTERFACE: its other
    interfaces, and its pod's next sandboxes; the oldest first.
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
    pod: str
    by: str
    standby: tuple[str, ...] = ()

    @property
    def reach(self) -> str:
        """Who reaches it, as far as its address goes: "world", one "address" of this host, or "localhost"."""
        if self.host_ip in ("0.0.0.0", "::"):
            return "world"
        return "localhost" if is_localhost(self.host_ip) else "address"


def published(kernel: Kernel) -> list[Published]:
    """All published ports, by host port, from the verdict maps: a rule without a map entry has no effect."""
    lines, owners, _ = _lines(kernel)
    verdicts = kernel.judge(owners.values())
    found = [line._replace(owner=verdicts[chain][0]) for chain, line in lines]
    return _joined(sorted(found, key=lambda line: (line.host_ports[0], line.protocol, line.family, line.host_ip)))


def connections(kernel: Kernel) -> tuple[list[Published], list[tuple[Owner, int]]]:
    """All published ports, a line for each rule, whose owners nobody judges; and each owner's new connections."""
    lines, owners, counts = _lines(kernel)
    return [line for _, line in lines], [(owner, counts[chain]) for chain, owner in owners.items() if chain in counts]


def _lines(kernel: Kernel) -> tuple[list[tuple[str, Published]], dict[str, Owner], dict[str, int]]:
    """The published ports, each with its chain; the owner of each chain, and how many connections it has counted."""
    rules: dict[str, list[DnatRule]] = {}
    by_port: dict[tuple[str, int, int, int], list[DnatRule]] = {}  # chain, protocol, size of the target, host port
    records: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for chain, comment, raw, _ in kernel.rules():
        if is_attachment_chain(chain):
            if b"nat\0" not in raw:
                if chain not in records:  # the first of the record counts
                    counts[chain] = packets_in(raw)
                records.setdefault(chain, []).append(comment)
            else:
                for its in dnat_rules(raw, kernel.set_elements):
                    rules.setdefault(chain, []).append(its)
                    for port in its.ports:
                        by_port.setdefault((chain, its.protocol, len(its.target), port), []).append(its)
    owners: dict[str, Owner] = {}
    heirs: dict[str, dict[str, set[Element]]] = {}  # by chain: who stands by, as in Published, and what it wants
    found: dict[tuple[Any, ...], dict[int, int]] = {}
    for element, chain in kernel.elements():
        family, protocol, host, port = claim_of(element)
        fitting = by_port.get((chain, protocol, SIZES[family], port), ())
        # A condition may compare the destination address as well, so the address need not be the published one.
        rule = next((rule for rule in fitting if rule.daddr == host), fitting[0] if fitting else None)
        if chain not in owners:
            comments = records.get(chain, [])
            owners[chain] = Owner(chain, record_in(comments))
            who = [(container_id or owners[chain].container_id, ifname)
                   for ifname, container_id in standby_notes(comments)]
            heirs[chain] = {"/".join(heir): {each for its in rules.get(chain_of(*heir), ()) for each in elements_for(
                its.target, its.daddr, its.protocol, its.ports)} for heir in who}
        standby = tuple(heir for heir, wanted in heirs[chain].items() if element in wanted)
        found.setdefault((family, protocol, host, chain, rule, standby), {})[port] = rule.ports[port] if rule else 0
    lines = []
    for (family, protocol, host, chain, rule, standby), ports in found.items():
        hosts, owner = tuple(sorted(ports)), owners[chain]
        lines.append((chain, Published(family, PROTOCOLS.get(protocol, str(protocol)),
                                       address_text(host or bytes(SIZES[family])), hosts,
                                       address_text(rule.target) if rule else "", tuple(ports[host] for host in hosts),
                                       owner.network, owner.container_id, owner.ifname,
                                       rule.packets if rule else None, "", owner.netns, owner.pod,
                                       "operator" if owner.is_by_operator else "runtime", standby)))
    return lines, owners, counts


def _joined(lines: list[Published]) -> list[Published]:
    """Lines by host port; rules of consecutive ports that are shifted alike are one line, as people mean them."""
    joined: list[Published] = []
    last: dict[tuple[object, ...], int] = {}  # where the line is that another of the same container may go on
    for line in lines:
        shift = line.container_ports[0] - line.host_ports[0]
        key = line._replace(host_ports=(), container_ports=(), connections=0), shift
        at = last.get(key)
        if at is not None and shift and line.connections is not None and \
                joined[at].host_ports[-1] + 1 == line.host_ports[0]:
            joined[at] = joined[at]._replace(host_ports=joined[at].host_ports + line.host_ports,
                                             container_ports=joined[at].container_ports + line.container_ports,
                                             connections=(joined[at].connections or 0) + line.connections)
        else:
            last[key] = len(joined)
            joined.append(line)
    return joined


def address_text(address: bytes) -> str:
    """An address (packed) as people write it."""
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def ranges(ports: tuple[int, ...]) -> str:
    """Ports as people write them: (80, 9000, 9001, 9002) is "80,9000-9002"."""
    parts: list[list[int]] = []
    for port in ports:
        if parts and port == parts[-1][-1] + 1:
            parts[-1][1:] = [port]
        else:
            parts.append([port])
    return ",".join("-".join(map(str, part)) for part in parts)
