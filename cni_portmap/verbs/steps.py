"""The steps that verbs share: what is written, and what has to be there before.

Functions that return commands write nothing; a verb joins them to one transaction.
"""
from .. import ruleset
from ..attachment import Attachment, Port
from ..cni import FOREIGN_TABLE, INVALID_CONFIG, IO_FAILURE, NFT_REFUSED, PORT_TAKEN, CniError, warn

TYPE_CHECKING = False  # typing costs 2 ms; type checkers take this name as true
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ..linux.alive import Verdict
    from ..linux.kernel import Kernel
    from ..ruleset import Element, Owner

    Judged = dict[tuple[str, int], Verdict]  # by chain and handle


def try_conditions(attachment: Attachment, kernel: "Kernel") -> None:
    """Let nft read the conditions, alone: the one free text of a configuration. Raises CniError(7)."""
    for family, text in attachment.conditions.items():
        protocols = sorted({port.protocol for port in attachment.ports if port.family == family})
        problem = kernel.dry_run_apart(ruleset.probe(family, text, protocols)) if text and protocols else ""
        if problem:
            raise CniError(INVALID_CONFIG, f"conditionsV{family}: {text!r} is not nft match text for "
                           f"{' and '.join(protocols)} ports", problem)


def chains_of_container(chains: "Iterable[str]", attachment: Attachment, kernel: "Kernel") -> set[str]:
    """The chains among `chains` that belong to the attachment's container, on any interface."""
    own = ruleset.chain_of(attachment.container_id, attachment.ifname)
    return {chain for chain in filter(ruleset.is_attachment_chain, {*chains})
            if chain == own or kernel.owner(chain).container_id == attachment.container_id}


def attach(attachment: Attachment, elsewhere: "dict[Element, str]", kernel: "Kernel", rules: str,
            again: bool = True) -> str:
    """Commands that publish what is not published `elsewhere`, and record the standby interfaces.

    `again`: whether there may be a chain, with such notes, that is replaced.
    """
    chain = ruleset.chain_of(attachment.container_id, attachment.ifname)
    noted = ruleset.standby_interfaces(kernel.comments(chain)) if again else []
    notes = (ruleset.standby_note(chain, ifname) for ifname in noted)
    return ruleset.attach(attachment, elsewhere, rules) + "".join(notes) + \
        note_standby(attachment.ifname, elsewhere.values(), kernel)


def note_standby(ifname: str, chains: "Iterable[str]", kernel: "Kernel") -> str:
    """Commands that note in `chains` that their container publishes some of their ports on `ifname` too."""
    return "".join(ruleset.standby_note(chain, ifname) for chain in dict.fromkeys(chains)
                   if not _is_noted(chain, ifname, kernel))


def _is_noted(chain: str, ifname: str, kernel: "Kernel") -> bool:
    return ifname in ruleset.standby_interfaces(kernel.comments(chain))


def detach(chains: "list[str]", owned: "Iterable[tuple[Element, str]]",
            released: "Iterable[tuple[Element, str]]", kernel: "Kernel") -> str:
    """Commands that delete `chains` with all that they own, and give what is `released` to the standby chains."""
    if not chains:
        return ""
    return ruleset.detach(chains, [element for element, _ in owned]) + \
        ruleset.inherit(*inheritance(chains, released, kernel))


def inheritance(chains: "list[str]", released: "Iterable[tuple[Element, str]]", kernel: "Kernel") \
        -> "tuple[dict[Element, str], list[tuple[str, str]]]":
    """Who gets what `chains` have `released`, as they go: those of their containers that stand by for it.

    Returns where each element is to lead to, and what is to be noted: in which chain that which interface stands by.
    """
    inherited: dict[Element, str] = {}
    notes = []
    free_of: dict[str, list[Element]] = {}
    for element, chain in released:
        free_of.setdefault(chain, []).append(element)
    going = frozenset(chains)
    for chain in chains:
        standby, heirs = ruleset.standby_interfaces(kernel.comments(chain)), []
        container_id = kernel.owner(chain).container_id if standby else ""
        for ifname in standby:
            heir = ruleset.chain_of(container_id, ifname)
            if heir not in going and kernel.has_chain(heir):
                heirs.append((heir, ifname, _may_inherit(heir, kernel)))
        free = free_of.get(chain, [])
        for heir, ifname, wanted in heirs:
            its = [element for element in free if element in wanted]
            free = [element for element in free if element not in wanted]
            inherited.update(dict.fromkeys(its, heir))
            if its:
                notes += [(heir, other) for _, other, _ in heirs
                          if other != ifname and not _is_noted(heir, other, kernel)]
    return inherited, notes


def _may_inherit(heir: str, kernel: "Kernel") -> "set[Element]":
    """What of the elements that an heir wants it may have: not a port of every address in place of that of one."""
    wanted = kernel.elements_wanted_by(heir)
    has = {element for element, chain in kernel.lookup(wanted).items() if chain == heir}
    return wanted - {ruleset.wildcard_of_element(element) for element in has if element[0] != ruleset.HOSTPORTS}


def shared_chains(attachments: "Sequence[Attachment]", kernel: "Kernel") -> str:
    """Commands that make or repair what `attachments` share; "" where nothing is missing.

    Raises CniError(103) rather than remove a rule that this plugin did not write.
    """
    chains, replaced = {}, []
    for name in ruleset.SHARED:
        there = kernel.comments(name)
        if missing_in_order([comment for _, comment in ruleset.shared_rules(name, attachments)], there) is None:
            continue
        chains[name] = ruleset.shared_rules(name, attachments, there)
        if kernel.has_chain(name):
            replaced.append(name)
        for comment in there:
            if not comment.startswith(ruleset.COMMENT_PREFIX):
                raise CniError(FOREIGN_TABLE, f"cannot rebuild chain {name} of table {ruleset.TABLE}: it has a "
                               f"foreign rule", f"see: nft -a list chain {ruleset.TABLE} {name}")
    if not chains and not kernel.is_dormant():
        return ""
    text = ruleset.base(chains, replaced)
    if "guard" in replaced:  # an older one guarded every interface, and 0.1.0 noted none that it had opened
        from ..linux.localhost import interfaces_of_published
        comment = ruleset.WAS_OPEN if kernel.notes_interfaces() else ruleset.OPENED
        text += ruleset.note_interfaces(dict.fromkeys(interfaces_of_published(kernel), comment))
    return text


def missing_in_order(expected: "Iterable[object]", found: "Iterable[object]") -> int | None:
    """The place of the first of `expected` that is not among `found`, after the one before it; None if all are."""
    rest = iter(found)
    for index, item in enumerate(expected):
        if item not in rest:  # an iterator: `in` also moves past what it finds
            return index
    return None


def write_shared_chains(text: str, kernel: "Kernel") -> None:
    """Write the shared chains alone and first: localhost must not be opened before the guard exists.

    Raises CniError(100) where libnftables has dropped its rules, as it would drop an attachment's.
    """
    kernel.transact(text)
    if kernel.has_chain("guard") and not kernel.comments("guard"):
        raise CniError(NFT_REFUSED, "unsupported libnftables: it drops the rules of new chains",
                       "required: 1.0.7, or Debian's 1.0.6-2+deb12u2")


def repair_shared_chains(kernel: "Kernel", dry_run: bool = False) -> bool:
    """Repair what all containers share, where the table exists; whether there was anything to repair."""
    with kernel.lock():
        text = shared_chains([], kernel) if kernel.has_table() else ""
        if text and not dry_run:
            write_shared_chains(text, kernel)
    return bool(text)


# --- this host's localhost, and who is masqueraded --------------------------------------------------------------

def survey(attachment: Attachment, kernel: "Kernel", quiet: bool = False) -> None:
    """Find out how this host leads to a container: `ways`, `on_link` and `left_alone` of `attachment`.

    Where localhost cannot lead to it, that is one line on stderr, and localhost is left to the services of this host.
    Raises CniError(5) where a port is published there alone, and the system does not let it; not if `quiet`.
    """
    attachment.ways, attachment.on_link, left_alone = {}, (), set()
    if attachment.mark_bit is None:
        return  # no reply would come back through this host
    on_link: dict[tuple[str, str], None] = {}
    for family, address in attachment.addresses.items():
        name, leads, own = kernel.way_to(family, address.ip, attachment.links)
        prefixes = [prefix for prefix in attachment.prefixes if (":" in prefix) == (family == 6)]
        on_link |= {(name, prefix): None for prefix in (*prefixes, *own) if name}
        if not publishes_on_localhost(attachment, family):
            continue
        if family == 6 and not attachment.localhost6:
            left_alone.add(family)
            continue
        obstacle = kernel.localhost_obstacle(family, name) if leads else \
            f"{name or 'no interface of this host'} leads to {address.ip} and to containers alone"
        if not obstacle:
            attachment.ways[family] = name
            continue
        host = "127.0.0.1" if family == 4 else "[::1]"
        if quiet:
            continue
        if leads and family == 4 and any(port.host_ip.startswith("127.") for port in attachment.ports):
            raise CniError(IO_FAILURE, f"cannot publish on {host}: {obstacle}",
                           "run it as root, where /proc/sys is writable; or publish on another address")
        warn(f"cannot publish on {host}: {obstacle}")
        if not any(_is_localhost(port.host_ip) for port in attachment.ports
                   if port.family == family):  # else somebody wants it: from other sources than localhost it may work
            left_alone.add(family)
    attachment.on_link, attachment.left_alone = tuple(on_link), frozenset(left_alone)


def publishes_on_localhost(attachment: Attachment, family: int) -> bool:
    """Whether an attachment publishes ports on this host's localhost, alone or with all addresses."""
    ips = {port.host_ip for port in attachment.ports if port.family == family}
    return any(not ip or _is_localhost(ip) for ip in ips)


def _is_localhost(ip: str) -> bool:
    return ip == "::1" or ip.startswith("127.")


def interfaces_to_note(attachments: "Iterable[Attachment]", kernel: "Kernel", opened_by_us: bool = False) \
        -> dict[str, str]:
    """The interfaces that localhost leads through and that are not noted yet, each with its comment.

    `opened_by_us`: the table that would say so was lost; what is open to `attachments` counts as opened by this plugin.
    """
    names = dict.fromkeys(attachment.ways[4] for attachment in attachments if 4 in attachment.ways)
    return {name: ruleset.WAS_OPEN if kernel.localnet(name) and not opened_by_us else ruleset.OPENED
            for name in names if not kernel.is_noted(name)}


def open_localhost(attachments: "Iterable[Attachment]", kernel: "Kernel") -> None:
    """Let this host's localhost reach the containers that are published there, through what is noted by now."""
    for attachment in attachments:
        if 4 in attachment.ways and not kernel.localnet(attachment.ways[4]):
            kernel.set_localnet(attachment.ways[4], True)
        if 6 in attachment.ways:
            obstacle = kernel.allow_localhost6(attachment.ways[6])
            if obstacle:
                warn(f"cannot publish on [::1]: {obstacle}")


def share_on_link(attachment: Attachment, siblings: "Iterable[str]", kernel: "Kernel") -> str:
    """Commands that let the chains of a container's other interfaces masquerade whom this one makes neighbours.

    And `attachment` those of the others: a client may ask through one network, and be answered through another.
    """
    if attachment.mark_bit is None or not attachment.on_link:
        return ""
    own, text = attachment.on_link, ""
    for chain in dict.fromkeys(siblings):
        comments = kernel.comments(chain)
        text += ruleset.share_on_link(chain, comments, own, attachment.mark_bit)
        attachment.on_link = tuple(dict.fromkeys((*attachment.on_link, *ruleset.on_link_of(comments))))
    return text


def is_flush(error: CniError) -> bool:
    """Whether a transaction failed because what had been read was gone: somebody flushed the ruleset in between."""
    return error.code == NFT_REFUSED and "No such file or directory" in error.msg


# --- conflicts: one owner a port --------------------------------------------------------------------------------

# Owners are judged without the lock, and checked again under it by what cannot hang. The verdicts are kept by
# chain and handle: a chain that was rewritten meanwhile has another handle, and is judged again.

class Unjudged(Exception):
    """Owners without a verdict yet: they are judged without the lock, and then the call is tried again."""

    def __init__(self, owners: "list[Owner]") -> None:
        super().__init__()
        self.owners = owners


class PortTaken(CniError):
    """A port has an owner that is alive or unknown. `handle`: of the owner's chain."""

    def __init__(self, msg: str, details: str, owner: "Owner", handle: int) -> None:
        super().__init__(PORT_TAKEN, msg, details)
        self.owner, self.handle = owner, handle


def resolve_conflicts(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") \
        -> "tuple[list[str], dict[Element, str]]":
    """Find the present owners of the ports of `attachment`.

    Returns the chains of dead containers, which are replaced; and the elements that lead to this container through
    another of its interfaces, which stay, each with the chain that it leads to.

    Raises PortTaken where the owner is another and lives: a port has one owner, and it overlaps as in bind(2); and
    Unjudged where that is not known yet.
    """
    claims: dict[Element, Port] = {}
    wildcards: dict[str, dict[bytes, Port]] = {}
    for port in attachment.ports:
        key = ruleset.key_of(port)
        claims[ruleset.map_of(port), key] = port
        if port.host_ip:
            claims.setdefault(ruleset.wildcard_of(port), port)
        else:
            wildcards.setdefault(ruleset.HOSTIP_HOSTPORTS[port.family], {})[key[ruleset.PROTOCOL_AND_PORT]] = port
    leads_to = kernel.lookup(claims)
    taken: dict[str, Port] = {}
    for element, owner in leads_to.items():
        taken.setdefault(owner, claims[element])
    for name, endings in wildcards.items():
        for owner, ending in kernel.owners_of_port(name, endings):
            taken.setdefault(owner, endings[ending])
    taken.pop(chain, None)
    for other, port in taken.items():
        if not ruleset.is_attachment_chain(other):
            raise CniError(FOREIGN_TABLE, f"{port} is already used by a foreign map element",
                           f"find it: nft list table {ruleset.TABLE}")
    owners = {other: kernel.owner(other) for other in taken}
    verdicts = {other: verdict_on(owner, attachment, judged, kernel) for other, owner in owners.items()}
    unjudged = [owner for other, owner in owners.items() if verdicts[other] is None]
    if unjudged:
        raise Unjudged(unjudged)
    dead, siblings = [], []
    for other, port in taken.items():
        state, why = verdicts[other] or ("", "")
        if state == "dead":
            dead.append(other)
        elif owners[other].container_id == attachment.container_id and _same_namespace(owners[other], attachment):
            siblings.append(other)
            warn(f"{port} is already published through {owners[other].ifname} of this container; "
                 f"{attachment.ifname} will take over when {owners[other].ifname} is removed")
        else:
            raise PortTaken(f"{port} is already published by {owners[other]}", why, owners[other],
                            kernel.handle(other))
    own = ruleset.elements_of(attachment)
    return dead, {element: owner for element, owner in leads_to.items() if owner in siblings and element in own}


def _same_namespace(owner: "Owner", attachment: Attachment) -> bool:
    """Whether two interfaces may be in one network namespace, as those of one container are."""
    return not owner.inode or not attachment.inode or owner.inode == attachment.inode


def refuse_namesake(attachment: Attachment, chain: str, kernel: "Kernel", judged: "Judged") -> None:
    """Raise CniError(101) if the attachment's own chain belongs to a namesake: in another network, and it lives.

    Runtimes that share a host may use one container ID twice; network, ID and interface together are unique.
    """
    owner = kernel.owner(chain)
    if owner.network in ("", attachment.network) or (owner.inode and owner.inode == attachment.inode) or \
            (owner.link and owner.link == attachment.link):
        return
    verdict = verdict_on(owner, attachment, judged, kernel)
    if verdict is None:
        raise Unjudged([owner])
    if verdict[0] != "dead":
        raise PortTaken(f"this container ID and interface are already published: {owner}", verdict[1], owner,
                        kernel.handle(chain))


def judge(owners: "list[Owner]", judged: "Judged", kernel: "Kernel") -> None:
    """Judge these owners, as they are now. Not under the lock."""
    handles = {owner.chain: kernel.handle(owner.chain) for owner in owners}
    now = [kernel.owner(chain) for chain in handles]
    for owner, before in zip(now, owners, strict=True):
        owner.link = owner.link if before.link else ""
    verdicts = kernel.judge(now)
    judged |= {(chain, handles[chain]): verdict for chain, verdict in verdicts.items()}


def verdict_on(owner: "Owner", attachment: Attachment, judged: "Judged", kernel: "Kernel") -> "Verdict | None":
    """The verdict on an owner that conflicts with `attachment`, which lives; None if it is not known under the lock."""
    seen = kernel.glance(owner)
    another = owner.container_id != attachment.container_id
    if another and owner.link and owner.link == attachment.link:
        owner.link = ""  # one of the two does not own it: it is no witness
    elif seen:
        return seen
    if owner.inode and owner.inode == attachment.inode:
        if another and owner.ifname == attachment.ifname:
            return "dead", "its interface is another's"  # one of a name in a namespace; its number may be used again
        return "alive", f"its network namespace {owner.netns} is alive"
    return judged.get((owner.chain, kernel.handle(owner.chain)))
