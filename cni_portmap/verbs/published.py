"""The published ports, read back from the kernel: for people and their scripts, not for the plugin.

Through netlink, since nft's JSON takes three seconds with 10,000 containers.
"""
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, NamedTuple

from ..linux.expressions import DnatRule
from ..linux.kernel import Kernel
from ..linux.table import record_in
from ..ruleset import PROTOCOLS, Owner, claim_of, is_attachment_chain


SIZES = {4: 4, 6: 16}  # bytes of an address


class Published(NamedTuple):
    """Host ports that lead to container ports, as many and in the same order: a rule, or rules for consecutive ports.

    `connections`: the number of connections through it so far; None if the rule is missing. `owner`: "alive", "dead",
    or "unknown". `pod`: the container's name for people, "" if no runtime sent one.
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


def published(kernel: Kernel) -> list[Published]:
    """All published ports, by host port, from the verdict maps: a rule without a map entry has no effect."""
    rules: dict[str, list[DnatRule]] = {}
    records: dict[str, list[str]] = {}
    for chain, comment, raw in kernel.rules():
        if is_attachment_chain(chain):
            if b"nat\0" not in raw:
                records.setdefault(chain, []).append(comment)
            else:
                rules.setdefault(chain, []).append(DnatRule(raw, kernel.set_elements))
    owners: dict[str, Owner] = {}
    found: dict[tuple[Any, ...], dict[int, int]] = {}
    for element, chain in kernel.elements():
        family, protocol, host, port = claim_of(element)
        fitting = [rule for rule in rules.get(chain, ())
                   if rule.protocol == protocol and len(rule.target) == SIZES[family] and port in rule.ports]
        # A condition may compare the destination address as well, so the address need not be the published one.
        rule = next((rule for rule in fitting if rule.daddr == host), fitting[0] if fitting else None)
        found.setdefault((family, protocol, host, chain, rule), {})[port] = rule.ports[port] if rule else 0
        if chain not in owners:
            owners[chain] = Owner(chain, record_in(records.get(chain, [])))
    verdicts = kernel.judge(owners.values())
    lines = []
    for (family, protocol, host, chain, rule), ports in found.items():
        hosts, owner, state = tuple(sorted(ports)), owners[chain], verdicts[chain][0]
        lines.append(Published(family, PROTOCOLS.get(protocol, str(protocol)), _text(host or bytes(SIZES[family])),
                               hosts, _text(rule.target) if rule else "", tuple(ports[host] for host in hosts),
                               owner.network, owner.container_id, owner.ifname, rule.packets if rule else None,
                               state, owner.netns, owner.pod))
    return _joined(sorted(lines, key=lambda line: (line.host_ports[0], line.protocol, line.family, line.host_ip)))


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


def _text(address: bytes) -> str:
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
