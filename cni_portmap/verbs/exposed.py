"""Who reaches which container past its published ports, read back from the kernel: for people and their scripts."""
from collections.abc import Iterable
from typing import NamedTuple

from .. import ruleset
from ..exposure import SETS, SHARED, comment_of, exposure_in, members_of
from ..linux.kernel import Kernel
from .steps import missing_in_order


class Exposed(NamedTuple):
    """A policy for the addresses of one family of a container.

    `open`: the container ports that everybody reaches there, as text ("80/tcp"); `trusted`: those that the `interfaces`
    of this host reach; `conditions`: whether conditions restrict both; `outgoing`: as whom it goes out, "" where others
    decide. `complete`: whether all of it is in the kernel. `owner`: "alive", "dead", or "unknown".
    """

    family: int
    addresses: tuple[str, ...]
    mode: str
    open: tuple[str, ...]
    trusted: tuple[str, ...]
    interfaces: tuple[str, ...]
    conditions: bool
    outgoing: str
    network: str
    container_id: str
    ifname: str
    complete: bool
    owner: str
    netns: str
    pod: str


def exposed(kernel: Kernel) -> list[Exposed]:
    """All policies, by address, from the records of the containers."""
    owners = [(owner, found) for owner in kernel.owners() if (found := exposure_in(owner.record))]
    if not owners:
        return []
    there = {(member, comment) for name in SETS for member, comment in kernel.members(name)}
    rules_are_whole = all(missing_in_order([comment for _, comment in ruleset.shared_rules(name, [], (), SHARED)],
                                           kernel.comments(name)) is None for name in SHARED)
    verdicts = kernel.judge([owner for owner, _ in owners])
    lines = [Exposed(
        each.family, each.ips, each.mode, _texts(each.opened), _texts(each.trusted), each.interfaces,
        bool(each.conditions), each.outgoing, owner.network, owner.container_id, owner.ifname,
        rules_are_whole and all((member, comment_of(owner.chain)) in there
                                for member in members_of(each, owner.chain)),
        verdicts[owner.chain][0], owner.netns, owner.pod) for owner, found in owners for each in found]
    return sorted(lines, key=lambda line: (line.network, line.family, line.addresses))


def modes_of(owner: ruleset.Owner) -> dict[str, str]:
    """The keys gatewayModeV4 and gatewayModeV6 of an owner's network, as far as its record tells."""
    return {f"gatewayModeV{each.family}": each.mode for each in exposure_in(owner.record) or ()}


def _texts(ports: Iterable[tuple[str, int]]) -> tuple[str, ...]:
    return tuple(f"{port}/{protocol}" for protocol, port in sorted(ports, key=lambda pair: (pair[1], pair[0])))
