"""The ports that others publish on this host, and those that two publish: neither refuses what the other has.

Read from the rules of everybody as they stand, see `firewall.claims`: so a port may be narrower than it is shown, by a
condition that is not known there.
"""
from collections.abc import Iterable, Iterator
from socket import inet_ntop
from typing import NamedTuple

from ..attachment import AF
from ..firewall.claims import ANY, Claim, claims, publisher
from ..linux.kernel import Kernel
from ..linux.rulesets import Rulesets
from ..reference import Leftover
from ..ruleset import PROTOCOLS, TABLE_NAME
from .published import SIZES, Published, address_text

OURS = "cni-portmap"
UNKNOWN = "unknown"
LOCALHOST = {4: b"\x7f", 6: bytes(15) + b"\1"}  # what its addresses begin with


class Publication(NamedTuple):
    """Ports that somebody publishes. `publisher`: who, "unknown" where no name tells; `rule`: the chain that says so.

    `split`: the others who publish one of these ports too, at an address of these.
    """

    published: Published
    publisher: str
    rule: str
    split: tuple[str, ...]


def everybody(own: Iterable[Published], kernel: Kernel) -> tuple[list[Publication], str]:
    """What is published here, by `own` and by others, by host port; and why iptables-legacy could not be read, or "".

    What leads everything elsewhere, whatever its port, is not listed, nor are addresses that are none of this host's,
    such as those of services (kube-proxy).
    """
    rulesets = Rulesets()
    try:
        found = [Publication(line, OURS, f"nft table inet {TABLE_NAME}", ()) for line in own]
        found += _of_others(rulesets, kernel)
    finally:
        rulesets.close()
    found.sort(key=lambda each: (each.published.host_ports[0], each.published.protocol, each.published.family,
                                 each.published.host_ip, each.publisher))
    return _with_split(found), rulesets.unreadable


def _of_others(rulesets: Rulesets, kernel: Kernel) -> Iterator[Publication]:
    local = kernel.local_addresses()
    left = kernel.leftovers(lambda *_: True) if kernel.has_reference() else []
    for claim in claims(rulesets, ("inet", TABLE_NAME)):
        if claim.ports == ANY or not (not claim.daddr or claim.daddr in local or
                                      claim.daddr.startswith(LOCALHOST[claim.family])):
            continue
        ports = tuple(sorted({port for first, last in claim.ports for port in range(first, last + 1)}))
        owner = next((each for each in left if _is_of(each, claim, ports)), None)
        target = claim.target if claim.target and len(claim.target) == SIZES[claim.family] else b""
        line = Published(
            claim.family, PROTOCOLS.get(claim.protocol, str(claim.protocol)) if claim.protocol else "any",
            address_text(claim.daddr or bytes(SIZES[claim.family])), ports, address_text(target) if target else "",
            tuple(claim.port or port for port in ports), owner.network if owner else "",
            owner.container_id if owner else "", "", claim.rule.packets, "", "", "", "")
        yield Publication(line, publisher(claim.chain) or UNKNOWN, str(claim.chain), ())


def _is_of(leftover: Leftover, claim: Claim, ports: tuple[int, ...]) -> bool:
    return any((protocol, host, target) == (claim.protocol, claim.daddr, claim.target) and port in ports
               for protocol, host, port, target in leftover.forwards)


def _with_split(found: list[Publication]) -> list[Publication]:
    by_port: dict[tuple[int, int], list[Publication]] = {}  # by family and host port
    for each in found:
        for port in each.published.host_ports:
            by_port.setdefault((each.published.family, port), []).append(each)
    return [each._replace(split=tuple(sorted({
        other.publisher for port in each.published.host_ports for other in by_port[each.published.family, port]
        if other.publisher != each.publisher and _overlap(each.published, other.published)}))) for each in found]


def _overlap(one: Published, other: Published) -> bool:
    """Whether a packet for a port that both have may be for both, as in bind(2)."""
    everything = inet_ntop(AF[one.family], bytes(SIZES[one.family]))
    return (one.protocol == other.protocol or "any" in (one.protocol, other.protocol)) and \
        (one.host_ip == other.host_ip or everything in (one.host_ip, other.host_ip))
