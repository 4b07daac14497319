"""Exposure, as the verbs need it: what the kernel knows of a container's networks, and which element is whose.

Loaded only where an attachment has an exposure, or the table the sets of others.
"""
from _socket import inet_pton

from ..attachment import AF, Attachment
from ..cni import CHECK_FAILED, CniError
from ..exposure import (ANCHORS, SETS, address_in, commands, comment_of, conditional_rules, created_for, exposure_in,
                        member_text, members_of, note_of, size_of)
from ..linux.table import MANY_PORTS
from ..ruleset import BY_OPERATOR, TABLE, chain_of, chain_of_conditions, created, own_chain

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..linux.kernel import Kernel
    from ..ruleset import Change, Member


def survey(attachment: Attachment, kernel: "Kernel") -> None:
    """Find out which interfaces lead to a container's own network, and write down its exposure for the record."""
    for each in attachment.exposure:
        each.home, each.is_routed = kernel.home_of(each.family, each.ips[0], attachment.links)
        each.note = note_of(each)


def fill(change: "Change", attachments: "Iterable[Attachment]", kernel: "Kernel") -> None:
    """Add to a change what goes from the sets with its chains, and what comes with these attachments.

    The policy follows the address: whoever has elements for an address of an attachment loses them. But not the
    container of what an operator publishes: that says nothing of its policy.
    """
    chains = [chain for chain in change.chains if not chain.startswith(f"{BY_OPERATOR}/")]
    removed: dict[Member, str] = {}
    for chain in chains:
        removed |= dict.fromkeys(_owned(chain, kernel), comment_of(chain))
        if kernel.has_chain(chain_of_conditions(chain)):
            change.chains.append(chain_of_conditions(chain))
    addresses = {address for each in attachments for address in addresses_of(each)}
    if addresses and (chains or _anchors(addresses, kernel)):
        own = {comment_of(chain_of(each.container_id, each.ifname)) for each in attachments if each.by_operator}
        removed |= {member: its for member, its in members_at(addresses, kernel).items() if its not in own}
    change.removed = removed
    taken = set()
    for each in attachments:
        chain = chain_of(each.container_id, each.ifname)
        rules = conditional_rules(each)
        if rules:
            change.rules[chain_of_conditions(chain)] = created(chain_of_conditions(chain), rules)
        for member, comment in created_for(each, chain).items():
            if member[:2] not in taken:  # of two with one address the first has it
                change.created[member] = comment
                taken.add(member[:2])
    change.exposure = commands(change.removed, change.created)


def addresses_of(attachment: Attachment) -> set[bytes]:
    """The addresses of an attachment, packed: those that its ports lead to, and those with an exposure."""
    ips = {(family, address.ip) for family, address in attachment.addresses.items()}
    ips |= {(each.family, ip) for each in attachment.exposure for ip in each.ips}
    return {inet_pton(AF[family], ip) for family, ip in ips}


def _anchors(addresses: "Iterable[bytes]", kernel: "Kernel") -> "dict[tuple[str, bytes], str]":
    """The elements whose key is one of these addresses alone, each with its comment."""
    return kernel.element_comments([(f"{name}{4 if len(address) == 4 else 6}", address) for address in addresses
                                    for name in ANCHORS])


def members_at(addresses: "Iterable[bytes]", kernel: "Kernel") -> "dict[Member, str]":
    """All elements for these addresses, each with its comment. Reads all sets."""
    wanted = {*addresses}
    return {member: comment for member, comment in _all(kernel) if address_in(*member[:2]) in wanted}


def _all(kernel: "Kernel") -> "Iterable[tuple[Member, str]]":
    for name in SETS:
        for member, comment in kernel.members(name):
            if len(member[1]) == size_of(name):
                yield member, comment


def _owned(chain: str, kernel: "Kernel") -> "list[Member]":
    """The elements that a chain owns: its record names them, and their comment proves it."""
    owner, comment = kernel.owner(chain), comment_of(chain)
    exposure = exposure_in(owner.record)
    if exposure == () and owner.network:
        return []
    noted = [member for each in exposure or () for member in members_of(each, chain)]
    if not noted or len(noted) > MANY_PORTS:  # the record is lost or not as we write it, or to list is quicker
        return [member for member, its in _all(kernel) if its == comment]
    comments = kernel.element_comments([member[:2] for member in noted])
    return [member for member in noted if comments.get(member[:2]) == comment]


def is_whole(attachment: Attachment, kernel: "Kernel") -> bool:
    """Whether nothing was removed of the exposure of an attachment."""
    wanted = [member[:2] for member in created_for(attachment, own_chain(attachment))]
    return len(kernel.element_comments(wanted)) == len({*wanted})


def check(attachment: Attachment, found: "dict[Member, str]") -> None:
    """Compare the elements that there are for the addresses of an attachment with its exposure.

    Raises CniError(104), which names the first that is missing, another's or foreign.
    """
    wanted = created_for(attachment, own_chain(attachment))
    for member, comment in wanted.items():
        if found.get(member) != comment:
            its = f"it is that of {found[member] or 'nobody'}" if member in found else "no such element"
            raise CniError(CHECK_FAILED, f"set {member[0]} has not this container's {member_text(member)}: {its}",
                           f"see: nft list set {TABLE} {member[0]}")
    for member in found.keys() - wanted.keys():
        raise CniError(CHECK_FAILED, f"set {member[0]} has {member_text(member)}, which is not this container's",
                       f"see: nft list set {TABLE} {member[0]}")
