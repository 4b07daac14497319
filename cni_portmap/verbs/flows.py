"""The choice of stale connections.

Flows that conntrack still sends where they should not go any more would black-hole a client for as long as it keeps
sending (k8s#58336, plugins#123, plugins#1190).
"""
from _socket import inet_pton

from .. import ruleset
from ..attachment import AF, Attachment

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from ..linux.conntrack import Filter, Flow
    from ..linux.kernel import Kernel
    from ..ruleset import Element

    Claims = dict[tuple[int, int], set[bytes]]  # (family, port): the host addresses, packed; b"" for all of them


class Elsewhere:
    """Flows to published ports that lead to others than `targets` (container addresses, packed)."""

    def __init__(self, claims: "Claims", targets: set[bytes], kernel: "Kernel") -> None:
        self._claims, self._targets, self._kernel = claims, targets, kernel

    def filters(self) -> "list[Filter]":
        """Filters for the kernel: all flows to these ports, because it cannot select by another target."""
        return [(family, port, host, b"") for (family, port), hosts in self._claims.items()
                for host in (_of_family(family, self._kernel.local_addresses()) if b"" in hosts else hosts)]

    def matches(self, flow: "Flow") -> bool:
        """Whether a flow is stale."""
        hosts = self._claims.get((flow.family, flow.port), ())
        return flow.target not in self._targets and \
            (flow.destination in hosts or (b"" in hosts and flow.destination in self._kernel.local_addresses()))


class Released:
    """Flows to ports that are not published any more, which led to `targets` (container addresses, packed)."""

    def __init__(self, claims: "Claims", targets: set[bytes]) -> None:
        self._claims, self._targets = claims, targets

    def filters(self) -> "list[Filter]":
        """Filters for the kernel."""
        return [(family, port, host, target) for (family, port), hosts in self._claims.items()
                for host in hosts for target in _of_family(family, self._targets)]

    def matches(self, flow: "Flow") -> bool:
        """Whether a flow is stale."""
        hosts = self._claims.get((flow.family, flow.port), ())
        return flow.target in self._targets and (flow.destination in hosts or b"" in hosts)


def delete_flows_elsewhere(attachment: Attachment, leads: "Mapping[Element, str]", kernel: "Kernel") -> None:
    """Delete the flows, of protocols that have no connections, to published ports that lead elsewhere.

    `leads`: elements, each with the chain that it leads to; what the attachment only stands by for is another's.
    """
    targets = {inet_pton(AF[family], address.ip) for family, address in attachment.addresses.items()}
    own = ruleset.own_chain(attachment)
    for protocol, claims in _claims(element for element, chain in leads.items() if chain == own).items():
        if protocol != ruleset.PROTOCOL_NUMBERS["tcp"]:  # there a new connection is a new flow
            stale = Elsewhere(claims, targets, kernel)
            kernel.delete_flows(protocol, stale.filters, stale.matches)


def delete_flows_to(claimed: "dict[str, list[Element]]", kernel: "Kernel") -> None:
    """Delete the flows, of protocols that have no connections, to ports that a chain publishes, which lead elsewhere.

    `claimed`: the elements of each chain, which were not there for a while.
    """
    for chain, elements in claimed.items():
        claims = _claims(elements)
        claims.pop(ruleset.PROTOCOL_NUMBERS["tcp"], None)
        targets = kernel.targets([chain])[chain] if claims else set()
        for protocol, its in claims.items():
            stale = Elsewhere(its, targets, kernel)
            kernel.delete_flows(protocol, stale.filters, stale.matches)


def delete_released_flows(released: "Iterable[tuple[Element, str]]", targets: dict[str, set[bytes]],
                          kernel: "Kernel") -> None:
    """Delete the flows to ports that are not published any more, to the containers that they led to.

    `released`: elements, each with the chain that it led to; `targets`: where those led.
    """
    by_chain: dict[str, list[Element]] = {}
    for element, chain in released:
        by_chain.setdefault(chain, []).append(element)
    for chain, elements in by_chain.items():
        for protocol, claims in _claims(elements).items():
            stale = Released(claims, targets[chain])
            kernel.delete_flows(protocol, stale.filters, stale.matches)


def _claims(elements: "Iterable[Element]") -> "dict[int, Claims]":
    """The claims of elements, by protocol number."""
    claims: dict[int, Claims] = {}
    for family, protocol, host, port in map(ruleset.claim_of, elements):
        claims.setdefault(protocol, {}).setdefault((family, port), set()).add(host)
    return claims


def _of_family(family: int, addresses: "Iterable[bytes]") -> "list[bytes]":
    return [address for address in addresses if len(address) == (4 if family == 4 else 16)]
